"""The parts that every convolution kernel is made of.

A convolution is the matrix product  y[o, p] = sum_k w[o, k] x[k, p]  over k = (tap, channel):

    o   output channels, BLOCK_CO of them in a tile: the rows (M) of the product
    p   pixels of y, BLOCK_N images x BLOCK_H rows x BLOCK_W columns in a tile: the columns (N)
    k   one filter tap and BLOCK_K channels a step: x is read shifted by the tap, never unfolded

Tap (i, j) of the filter meets pixel (h STRIDE_H + i - PAD, w STRIDE_W + j - PAD) of x at pixel (h, w) of y.

The weights stand on the left and the pixels, transposed, on the right. On Hopper the left operand
of an MMA may come from registers, which serialises it; the weights arrive straight from memory, so
both operands stay in shared memory, and 64 output channels still fill a tile.

Layouts: x is NHWC with unit channel stride, w is (O, KSIZE, KSIZE, C) contiguous (the memory of a
channels_last torch weight), y is NHWC contiguous. Accumulation is in float32.

``x`` and ``w`` are pointers, or TMA descriptors where ``USE_TMA``: boxes of x are then
(BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_K), whose rows and columns outside the image arrive as zeros.
"""

import triton
import triton.language as tl

from .tf32 import rounded_to_tf32

# The interpreter keeps bfloat16 as integers and multiplies those; in float32 the products are exact.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tile_origin(H, W, O, BLOCK_CO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """First image, row, column and output channel of this program's tile.

    Output channels vary fastest: neighbouring programs read the same pixels, which stay in L2.
    """
    tile = tl.program_id(0)
    tiles_o = tl.cdiv(O, BLOCK_CO)
    tiles_w = tl.cdiv(W, BLOCK_W)
    tiles_h = tl.cdiv(H, BLOCK_H)
    co = (tile % tiles_o) * BLOCK_CO
    tile = tile // tiles_o
    w = (tile % tiles_w) * BLOCK_W
    tile = tile // tiles_w
    return (tile // tiles_h) * BLOCK_N, (tile % tiles_h) * BLOCK_H, w, co


@triton.jit
def tile_pixels(n0, h0, w0, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Image, row and column of each pixel of the tile, each [BLOCK_P]."""
    p = tl.arange(0, BLOCK_N * BLOCK_H * BLOCK_W)
    return n0 + p // (BLOCK_H * BLOCK_W), h0 + p // BLOCK_W % BLOCK_H, w0 + p % BLOCK_W


@triton.jit
def convolved(size, KSIZE: tl.constexpr, PAD: tl.constexpr, STRIDE: tl.constexpr):
    """Rows or columns of a convolution's result; of the usual geometry the compiler makes it ``size``."""
    return (size + (2 * PAD - KSIZE)) // STRIDE + 1


@triton.jit
def dot(w, x, acc, PRECISION: tl.constexpr, ROUNDED: tl.constexpr):
    """acc [BLOCK_CO, BLOCK_P] + w [BLOCK_CO, BLOCK_K] @ transposed x [BLOCK_P, BLOCK_K].

    For tf32 w is rounded beforehand; ROUNDED: x is, too, as TMA does. In registers it costs WGMMA a way through
    shared memory, and each product a wait for the one before.
    """
    if INTERPRETED:
        w, x = w.to(tl.float32), x.to(tl.float32)
    elif PRECISION == "tf32" and not ROUNDED:
        x = rounded_to_tf32(x)
    return tl.dot(w, x.T, acc, input_precision=PRECISION)


@triton.jit
def load_weights(
    w, row0, rows, column0, columns, C, USE_TMA: tl.constexpr, BLOCK_CO: tl.constexpr, BLOCK_K: tl.constexpr
):
    """[BLOCK_CO, BLOCK_K] of w, whose rows have ``columns``: at most ``rows`` rows and C channels of it."""
    if USE_TMA:
        tile = w.load([row0, column0])
    else:
        co = tl.arange(0, BLOCK_CO)
        c = tl.arange(0, BLOCK_K)
        offset = (row0 + co).to(tl.int64)[:, None] * columns + (column0 + c)[None, :]
        tile = tl.load(w + offset, mask=(co < rows)[:, None] & (c < C)[None, :], other=0.0)
    return tile


@triton.jit
def accumulate(
    acc, x, w, w_row0, w_rows, w_channel0, w_channels,
    n0, h0, w0, N, C, x_height, x_width, x_top, x_left, stride_xn, stride_xh, stride_xw,
    KSIZE: tl.constexpr, PAD: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    BLOCK_CO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_CO, BLOCK_P] += w @ x over all taps and the C channels of one source.

    The source is x_height x x_width and lies at (x_top, x_left) of the map; around it are zeros. Its channels
    begin at ``w_channel0`` of the ``w_channels`` that the weight has for each tap. With TMA strides are 1.
    """
    n, h, col = tile_pixels(n0, h0, w0, BLOCK_N, BLOCK_H, BLOCK_W)
    # Under the middle tap, from which the others are a row or column away: their offset fits 32 bits.
    row0 = h * STRIDE_H + (KSIZE // 2 - PAD) - x_top
    column0 = col * STRIDE_W + (KSIZE // 2 - PAD) - x_left
    # int64: one image alone may hold more than 2**31 elements.
    origin = n.to(tl.int64) * stride_xn + row0.to(tl.int64) * stride_xh + column0.to(tl.int64) * stride_xw
    steps = tl.cdiv(C, BLOCK_K)
    for k in range(0, KSIZE * KSIZE * steps):
        tap = k // steps
        c0 = (k % steps) * BLOCK_K
        dh = tap // KSIZE - KSIZE // 2
        dw = tap % KSIZE - KSIZE // 2
        c = c0 + tl.arange(0, BLOCK_K)
        if USE_TMA:
            box = x.load([n0, h0 + tap // KSIZE - PAD - x_top, w0 + tap % KSIZE - PAD - x_left, c0])
            x_tile = box.reshape(BLOCK_N * BLOCK_H * BLOCK_W, BLOCK_K)
        else:
            row, column = row0 + dh, column0 + dw
            inside = (n < N) & (row >= 0) & (row < x_height) & (column >= 0) & (column < x_width)
            offset = origin[:, None] + (dh * stride_xh + dw * stride_xw + c)[None, :]
            x_tile = tl.load(x + offset, mask=inside[:, None] & (c < C)[None, :], other=0.0)  # [BLOCK_P, BLOCK_K]
        w_column = tap * w_channels + w_channel0 + c0
        w_tile = load_weights(
            w, w_row0, w_rows, w_column, KSIZE * KSIZE * w_channels, C - c0, USE_TMA, BLOCK_CO, BLOCK_K
        )
        acc = dot(w_tile, x_tile, acc, PRECISION, USE_TMA)
    return acc


@triton.jit
def add_bias_activate(acc, bias_ptr, co0, O, SCALED: tl.constexpr, SLOPE: tl.constexpr, BLOCK_CO: tl.constexpr):
    """acc [BLOCK_CO, BLOCK_P] -> activation(acc + bias); SCALED: activation(acc * bias[0] + bias[1])."""
    co = co0 + tl.arange(0, BLOCK_CO)
    if SCALED:
        acc *= tl.load(bias_ptr + co, mask=co < O, other=0.0).to(tl.float32)[:, None]
        bias_ptr += O
    acc += tl.load(bias_ptr + co, mask=co < O, other=0.0).to(tl.float32)[:, None]
    return activate(acc, SLOPE)


@triton.jit
def activate(acc, SLOPE: tl.constexpr):
    """SLOPE for what is below 0: 0 ReLU, 1 none, between them leaky."""
    if SLOPE == 0.0:
        acc = tl.where(acc <= 0, 0.0, acc)  # not max(): NaN must stay NaN, as in torch
    elif SLOPE != 1.0:
        acc = tl.where(acc <= 0, acc * SLOPE, acc)
    return acc


@triton.jit
def store_tile(y_ptr, tile, n, h, w, co0, N, H, W, O, BLOCK_CO: tl.constexpr):
    """Store [BLOCK_CO, pixels] to NHWC y at images n, rows h, columns w; what lies outside is dropped."""
    co = co0 + tl.arange(0, BLOCK_CO)
    pixel = (n.to(tl.int64) * H + h) * W + w
    mask = (co < O)[:, None] & ((n < N) & (h < H) & (w < W))[None, :]
    tl.store(y_ptr + pixel[None, :] * O + co[:, None], tile.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_head(
    y_ptr, acc, head_ptr, head_bias_ptr, n, h, w, N, H, W, O,
    CLASSES: tl.constexpr, BLOCK_CO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store a 1x1 convolution of acc [BLOCK_CO, pixels], which holds all O channels, to NHWC y of CLASSES channels.

    A product of 16 rows, whatever the classes; acc is rounded as a map between two operators is.
    """
    co = tl.arange(0, BLOCK_CO)
    k = tl.arange(0, 16)
    weight_mask = (k < CLASSES)[:, None] & (co < O)[None, :]
    weight = tl.load(head_ptr + k[:, None] * O + co[None, :], mask=weight_mask, other=0.0)
    # Where there is no channel acc may be NaN, of an x that is infinite.
    rounded = tl.where((co < O)[:, None], acc, 0.0).to(weight.dtype)
    if INTERPRETED:
        weight, rounded = weight.to(tl.float32), rounded.to(tl.float32)
    elif PRECISION == "tf32":
        weight, rounded = rounded_to_tf32(weight), rounded_to_tf32(rounded)
    logits = tl.dot(weight, rounded, input_precision=PRECISION)
    logits += tl.load(head_bias_ptr + k, mask=k < CLASSES, other=0.0).to(tl.float32)[:, None]
    store_tile(y_ptr, logits, n, h, w, 0, N, H, W, CLASSES, 16)


@triton.jit
def max_of_pairs(x):
    """Maximum over a last axis of 2, NaN first, as torch's max-pool has it."""
    a, b = tl.split(x)
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def store_pooled(
    pooled_ptr, acc, n0, h0, w0, co0, N, H, W, O,
    BLOCK_CO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Store the 2x2 max-pool of acc [BLOCK_CO, BLOCK_P] to NHWC pooled, (H // 2) x (W // 2)."""
    columns = max_of_pairs(acc.reshape(BLOCK_CO, BLOCK_N * BLOCK_H * BLOCK_W // 2, 2))
    rows = columns.reshape(BLOCK_CO, BLOCK_N * BLOCK_H // 2, 2, BLOCK_W // 2)
    pooled = max_of_pairs(rows.permute(0, 1, 3, 2)).reshape(BLOCK_CO, BLOCK_N * BLOCK_H * BLOCK_W // 4)
    n, h, w = tile_pixels(n0, h0 // 2, w0 // 2, BLOCK_N, BLOCK_H // 2, BLOCK_W // 2)
    store_tile(pooled_ptr, pooled, n, h, w, co0, N, H // 2, W // 2, O, BLOCK_CO)
