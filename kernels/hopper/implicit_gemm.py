"""A convolution as a warp-specialised matrix product on Hopper: what each of its three partitions does.

    y[o, p] = sum over k = (tap, channel) of w[o, k] x[k, p]

``load_tiles``, one warp, fills two rings of shared memory through TMA: boxes of pixels, whose rows
and columns outside the image arrive as zeros, and boxes of weights. Two ``multiply_tiles``, a
warpgroup each, multiply 64 output channels by BLOCK_P pixels. The weights stand on the left because
a warpgroup's product has 64 rows whatever it costs: 64 x 256 reads 10 KB of shared memory where
256 x 64 in 64 x 64 pieces reads 16.

Cooperative (128 output channels a tile): both warpgroups take the same tile, a half each.
Otherwise (64): they take turns, tile by tile; one stores while the other multiplies.

Halo: a box of pixels has two rows more than its tile, and the three taps of a column read it
shifted by one row each. L2 is read (BLOCK_H + 2) * 3 rows a tile instead of BLOCK_H * 9. It needs
rows of 8 pixels or more, so that each shift is a whole 1,024 bytes, where the swizzle repeats.

A stage is full when its bytes have arrived and empty when every warpgroup that reads it has said
so, which is one product later: one product runs while the next is issued.
"""

from .compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def tile_origin(
    tile, H, W, O,
    BLOCK_CO: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Share of the K loop, or row of a transposed filter, then first image, row, column and output channel of a tile.

    Parts and output channels vary fastest: what runs at one time reads the same pixels, from L2.
    """
    part = tile % PARTS
    tile = tile // PARTS
    tiles_o = gl.cdiv(O, BLOCK_CO)
    tiles_w = gl.cdiv(W, BLOCK_W)
    tiles_h = gl.cdiv(H, BLOCK_H)
    co = (tile % tiles_o) * BLOCK_CO
    tile = tile // tiles_o
    w = (tile % tiles_w) * BLOCK_W
    tile = tile // tiles_w
    return part, (tile // tiles_h) * BLOCK_N, (tile % tiles_h) * BLOCK_H, w, co


@gluon.jit
def _load_step(
    x, x_tail, w, step, n0, row, column, c0, co0, first_tap,
    x_ring, x_full, x_empty, w_ring, w_full, w_empty,
    KSIZE: gl.constexpr, HALO: gl.constexpr, X_STAGES: gl.constexpr, W_STAGES: gl.constexpr,
):  # fmt: skip
    """One box of pixels and the weights of every tap that reads it."""
    TAPS: gl.constexpr = KSIZE if HALO else 1
    box: gl.constexpr = x.block_type.shape
    layout: gl.constexpr = x.layout
    w_box: gl.constexpr = w.block_type.shape
    w_layout: gl.constexpr = w.layout
    stage = step % X_STAGES
    mbarrier.wait(x_empty.index(stage), ((step // X_STAGES) & 1) ^ 1)
    bar = x_full.index(stage)
    if HALO:
        tail_box: gl.constexpr = x_tail.block_type.shape
        tail_layout: gl.constexpr = x_tail.layout
        mbarrier.expect(bar, x.block_type.nbytes + x_tail.block_type.nbytes)
        first_slot = stage * (x_ring.shape[0] // X_STAGES)
        tail = reinterpret(x_ring.index(first_slot + box[1] * box[2] // 8), tail_box, tail_layout)
        tma_load(x_tail, [n0, row + box[1], column, c0], bar, tail)
        pixels = reinterpret(x_ring.index(first_slot), box, layout)
    else:
        mbarrier.expect(bar, x.block_type.nbytes)
        pixels = reinterpret(x_ring.index(stage), box, layout)
    tma_load(x, [n0, row, column, c0], bar, pixels)
    for i in gl.static_range(TAPS):
        w_step = step * TAPS + i
        w_stage = w_step % W_STAGES
        mbarrier.wait(w_empty.index(w_stage), ((w_step // W_STAGES) & 1) ^ 1)
        w_bar = w_full.index(w_stage)
        mbarrier.expect(w_bar, w.block_type.nbytes)
        weights = reinterpret(w_ring.index(w_stage), w_box, w_layout)
        tma_load(w, [co0, first_tap + i * KSIZE, c0], w_bar, weights)


@gluon.jit
def load_tiles(
    x1, x1_tail, w1, x2, x2_tail, w2, blocks1, top, left, steps, tiles, H, W, O,
    x_ring, x_full, x_empty, w_ring, w_full, w_empty,
    KSIZE: gl.constexpr, TWO_SOURCES: gl.constexpr, HALO: gl.constexpr, BLOCK_CO: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr, BLOCK_K: gl.constexpr,
    X_STAGES: gl.constexpr, W_STAGES: gl.constexpr, SPLITS: gl.constexpr, FILTER_ROWS: gl.constexpr,
):  # fmt: skip
    """The producer. The channels of the first source come first; it lies at (top, left) of the map."""
    COLUMNS: gl.constexpr = KSIZE if HALO else KSIZE * KSIZE  # boxes of pixels for BLOCK_K channels
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        part, n0, h0, w0, co0 = tile_origin(tile, H, W, O, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W, SPLITS * FILTER_ROWS)
        first = part % SPLITS * steps
        for k in range(first, first + steps):
            block = k // COLUMNS
            tap = k % COLUMNS
            row = h0 - KSIZE // 2 + tap // KSIZE
            column = w0 - KSIZE // 2 + tap % KSIZE
            if FILTER_ROWS > 1:
                tap = part  # which row of the filter, for the weights alone
            if block < blocks1:
                _load_step(
                    x1, x1_tail, w1, step, n0, row - top, column - left, block * BLOCK_K, co0, tap,
                    x_ring, x_full, x_empty, w_ring, w_full, w_empty, KSIZE, HALO, X_STAGES, W_STAGES,
                )  # fmt: skip
            elif TWO_SOURCES:
                _load_step(
                    x2, x2_tail, w2, step, n0, row, column, (block - blocks1) * BLOCK_K, co0, tap,
                    x_ring, x_full, x_empty, w_ring, w_full, w_empty, KSIZE, HALO, X_STAGES, W_STAGES,
                )  # fmt: skip
            step += 1


@gluon.jit
def _larger(a, b):
    """The larger of two, NaN first, as torch's max-pool has it."""
    return gl.where((a > b) | (a != a), a, b)


@gluon.jit
def _store_head(
    acc, y_ptr, head_ptr, head_bias_ptr, n0, h0, w0, N, H, W, O,
    BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr, CLASSES: gl.constexpr,
):  # fmt: skip
    """A 1x1 convolution of acc [64, pixels], which holds all O channels, to NHWC y of CLASSES channels."""
    BLOCK_P: gl.constexpr = acc.shape[1]
    # Sums lie in every row's registers; addresses are made where each pixel is in one thread.
    pixels: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    co = gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))
    p = gl.arange(0, BLOCK_P, pixels)
    n = n0 + p // (BLOCK_H * BLOCK_W)
    h = h0 + p // BLOCK_W % BLOCK_H
    w = w0 + p % BLOCK_W
    inside = (n < N) & (h < H) & (w < W)
    pixel = (n.to(gl.int64) * H + h) * W + w
    for k in range(0, CLASSES):
        weight = gl.load(head_ptr + (k * O + co), mask=co < O, other=0.0).to(gl.float32)
        # Where there is no channel acc may be NaN, of an x that is infinite.
        products = gl.where(gl.expand_dims(co < O, 1), acc * gl.expand_dims(weight, 1), 0.0)
        logit = gl.convert_layout(gl.sum(products, 0), pixels) + gl.load(head_bias_ptr + k).to(gl.float32)
        gl.store(y_ptr + (pixel * CLASSES + k), logit.to(y_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _store_tile(
    result, y, pooled, part, n0, h0, w0, co0, out, small,
    POOL: gl.constexpr, SPLITS: gl.constexpr, FILTER_ROWS: gl.constexpr,
):  # fmt: skip
    """[64, pixels], rounded, through shared memory to y; of its 2x2 max-pool the same."""
    BLOCK_P: gl.constexpr = result.shape[1]
    tma_store_wait(0)  # the last tile's, of which ``out`` is still being read
    out.reshape([BLOCK_P, 64]).permute([1, 0]).store(result)
    if POOL:
        rows: gl.constexpr = out.shape[0] * out.shape[1] // 2
        columns: gl.constexpr = out.shape[2] // 2
        pairs = result.reshape([64, rows, 2, columns, 2])  # rounding keeps the order, and takes half the registers
        largest = gl.reduce(gl.reduce(pairs, 4, _larger), 2, _larger)
        small.reshape([rows, columns, 64]).permute([2, 0, 1]).store(largest)
    fence_async_shared()
    if SPLITS > 1:
        tma_store(y, [part, n0, h0, w0, co0], out)
    elif FILTER_ROWS > 1:
        tma_store(y, [n0, h0, part, w0, co0], out)
    else:
        tma_store(y, [n0, h0, w0, co0], out)
    if POOL:
        tma_store(pooled, [n0, h0 // 2, w0 // 2, co0], small)


@gluon.jit
def _store_moments(
    result, moments_ptr, n0, h0, w0, co0, N, H, W, O,
    BLOCK_N: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr, PER_IMAGE: gl.constexpr,
):  # fmt: skip
    """Of a tile [64, pixels]: how many pixels lie in the map, their mean and squared deviations; [slab, 3, group, O].

    The group is the tile's image where PER_IMAGE, else there is one; a slab is a tile of the group.
    """
    mma: gl.constexpr = result.type.layout
    co = co0 + gl.arange(0, 64, gl.SliceLayout(1, mma))
    p = gl.arange(0, result.shape[1], gl.SliceLayout(0, mma))
    here = (n0 + p // (BLOCK_H * BLOCK_W) < N) & (h0 + p // BLOCK_W % BLOCK_H < H) & (w0 + p % BLOCK_W < W)
    inside = gl.expand_dims(here, 0)
    count = gl.minimum(N - n0, BLOCK_N) * gl.minimum(H - h0, BLOCK_H) * gl.minimum(W - w0, BLOCK_W)
    mean = gl.sum(gl.where(inside, result.to(gl.float32), 0.0), 1) / count
    apart = gl.where(inside, result.to(gl.float32) - gl.expand_dims(mean, 1), 0.0)
    squares = gl.sum(apart * apart, 1)
    slab = h0 // BLOCK_H * gl.cdiv(W, BLOCK_W) + w0 // BLOCK_W
    groups = 1
    group = 0
    if PER_IMAGE:
        groups = N
        group = n0
    else:
        slab += n0 // BLOCK_N * gl.cdiv(H, BLOCK_H) * gl.cdiv(W, BLOCK_W)
    row = moments_ptr + ((slab * 3 * groups + group) * O + co)
    gl.store(row, gl.where(co < O, 1.0, 0.0) * count, mask=co < O)
    gl.store(row + groups * O, mean, mask=co < O)
    gl.store(row + 2 * groups * O, squares, mask=co < O)


@gluon.jit
def _finish_tile(
    acc, bias_ptr, y, pooled, head_ptr, head_bias_ptr, moments_ptr, part, n0, h0, w0, co0, N, H, W, O, out, small,
    SCALED: gl.constexpr, SLOPE: gl.constexpr, POOL: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_H: gl.constexpr,
    BLOCK_W: gl.constexpr, SPLITS: gl.constexpr, FILTER_ROWS: gl.constexpr, CLASSES: gl.constexpr,
    MOMENTS: gl.constexpr,
):  # fmt: skip
    """Factor, bias, activation; then store, with max-pool, or the head's result. A split K loop's share as it is."""
    if SPLITS == 1:
        co = co0 + gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))
        channel = co
        if FILTER_ROWS > 1:
            channel = co % (O // FILTER_ROWS)
        if SCALED:
            factor = gl.load(bias_ptr + channel, mask=co < O, other=0.0).to(gl.float32)
            acc = acc * gl.expand_dims(factor, 1)
            bias_ptr += O
        bias = gl.load(bias_ptr + channel, mask=co < O, other=0.0).to(gl.float32)
        acc = acc + gl.expand_dims(bias, 1)
        if SLOPE == 0.0:
            acc = gl.where(acc <= 0, 0.0, acc)  # not maximum(): NaN must stay NaN, as in torch
        elif SLOPE != 1.0:
            acc = gl.where(acc <= 0, acc * SLOPE, acc)
    if CLASSES:
        _store_head(acc, y, head_ptr, head_bias_ptr, n0, h0, w0, N, H, W, O, BLOCK_H, BLOCK_W, CLASSES)
    else:
        result = acc.to(out.dtype)
        if MOMENTS:  # of what the norm will read, which makes roundings large where a channel hardly varies
            _store_moments(result, moments_ptr, n0, h0, w0, co0, N, H, W, O, BLOCK_N, BLOCK_H, BLOCK_W, MOMENTS == 2)
        _store_tile(result, y, pooled, part, n0, h0, w0, co0, out, small, POOL, SPLITS, FILTER_ROWS)


@gluon.jit
def multiply_tiles(
    bias_ptr, y, pooled, head_ptr, head_bias_ptr, moments_ptr, steps, tiles, N, H, W, O,
    x_ring, x_full, x_empty, w_ring, w_full, w_empty, turns, outs, smalls,
    KSIZE: gl.constexpr, SCALED: gl.constexpr, SLOPE: gl.constexpr, POOL: gl.constexpr, HALO: gl.constexpr,
    BLOCK_CO: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr,
    BLOCK_K: gl.constexpr, X_STAGES: gl.constexpr, W_STAGES: gl.constexpr, SPLITS: gl.constexpr,
    FILTER_ROWS: gl.constexpr, CLASSES: gl.constexpr, MOMENTS: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Consumer 0 or 1."""
    TAPS: gl.constexpr = KSIZE if HALO else 1
    COOPERATIVE: gl.constexpr = BLOCK_CO == 128
    BLOCK_P: gl.constexpr = BLOCK_N * BLOCK_H * BLOCK_W
    slots: gl.constexpr = x_ring.shape[0] // X_STAGES
    dtype: gl.constexpr = x_ring.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_P, 256 // dtype.primitive_bitwidth]
    )
    window: gl.constexpr = [BLOCK_P, BLOCK_K]
    layout: gl.constexpr = x_ring.layout
    first = gl.program_id(0)
    stride = gl.num_programs(0)
    step = 0
    if not COOPERATIVE:
        first += CONSUMER * stride
        step += CONSUMER * steps
        stride = 2 * stride
    turn = 0
    for tile in range(first, tiles, stride):
        if not COOPERATIVE:
            # Nobody waits for a stage before the other has waited for all of its own: else the
            # barrier's one bit of phase could mean the lap before.
            mbarrier.wait(turns.index(CONSUMER), (turn & 1) ^ (1 - CONSUMER))
            turn += 1
        acc = gl.zeros([64, BLOCK_P], gl.float32, mma)
        for k in range(0, steps):
            stage = step % X_STAGES
            mbarrier.wait(x_full.index(stage), (step // X_STAGES) & 1)
            for i in gl.static_range(TAPS):
                w_step = step * TAPS + i
                w_stage = w_step % W_STAGES
                mbarrier.wait(w_full.index(w_stage), (w_step // W_STAGES) & 1)
                weights = w_ring.index(w_stage)
                if COOPERATIVE:
                    weights = weights.slice(64 * CONSUMER, 64)
                if HALO:
                    slot = stage * slots + i * (BLOCK_W // 8)
                    pixels = reinterpret(x_ring.index(slot), window, layout)
                else:
                    pixels = x_ring.index(stage)
                acc = warpgroup_mma(weights, pixels.permute([1, 0]), acc, is_async=True)
                acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])
                # The product before this one is finished, and with it its stages.
                mbarrier.arrive(w_empty.index((w_step + W_STAGES - 1) % W_STAGES), pred=k + i > 0)
                if i == 0:
                    mbarrier.arrive(x_empty.index((step + X_STAGES - 1) % X_STAGES), pred=k > 0)
            step += 1
        if not COOPERATIVE:
            mbarrier.arrive(turns.index(1 - CONSUMER))
        acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
        mbarrier.arrive(w_empty.index((step * TAPS + W_STAGES - 1) % W_STAGES))
        mbarrier.arrive(x_empty.index((step + X_STAGES - 1) % X_STAGES))
        part, n0, h0, w0, co0 = tile_origin(tile, H, W, O, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W, SPLITS * FILTER_ROWS)
        if COOPERATIVE:
            co0 += 64 * CONSUMER
        else:
            step += steps  # the other's tile
        _finish_tile(
            acc, bias_ptr, y, pooled, head_ptr, head_bias_ptr, moments_ptr, part, n0, h0, w0, co0, N, H, W, O,
            outs.index(CONSUMER), smalls.index(CONSUMER),
            SCALED, SLOPE, POOL, BLOCK_N, BLOCK_H, BLOCK_W, SPLITS, FILTER_ROWS, CLASSES, MOMENTS,
        )  # fmt: skip
    tma_store_wait(0)
