"""Convolution, bias, activation and 2x2 max-pool on Hopper, from one source or two.

    y[n, o, h, w]      = act(b[o] + sum over c, i, j of weight[o, c, i, j] x[n, c, h + i - r, w + j - r])
    pooled[n, o, h, w] = max of the four y[n, o, 2h + {0, 1}, 2w + {0, 1}]

for K x K filters, K = 1 or 3, r = K // 2, zeros around x; x may be two tensors side by side on channels, which
are never copied together. The launchers are those of ../conv3x3.py and its neighbours, which this file's docstrings
do not repeat.

Tiling: a persistent program per multiprocessor takes tile after tile of BLOCK_CO output channels x BLOCK_N images x
BLOCK_H rows x BLOCK_W columns (implicit_gemm.py). SPLITS > 1: a tile is a share of the K loop, written in float32,
and split_k.py sums the shares.

Shapes: x (N, C, H, W), weight (O, C, K, K), bias (O,); float16, bfloat16, or float32 in tf32; C and O multiples of
16 bytes. y is of x's dtype, or float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import commuted
from ..tensors import bias_or_zeros, empty_channels_last, packed_weight, without_graph
from ..tuning import pointwise_config
from ..upsample_concat import upsample_concat_fwd
from .compat import TensorDescriptor, gdc_launch_dependents, gdc_wait, gl, gluon, mbarrier
from .implicit_gemm import load_tiles, multiply_tiles
from .split_k import sum_splits
from .tuning import HopperConfig, block_k, hopper_configs, multiprocessors, tma_ready, why_not


@gluon.jit
def _conv_fwd_kernel(
    x1, x1_tail, w1, x2, x2_tail, w2, bias_ptr, y, pooled,
    N, H, W, O, C1, C2, top, left,
    KSIZE: gl.constexpr, TWO_SOURCES: gl.constexpr, SLOPE: gl.constexpr, POOL: gl.constexpr, HALO: gl.constexpr,
    BLOCK_CO: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr,
    BLOCK_K: gl.constexpr, X_STAGES: gl.constexpr, W_STAGES: gl.constexpr, SPLITS: gl.constexpr,
):  # fmt: skip
    # The next launch may begin here, as far as its own wait: what it allocates and initialises takes as long as
    # this one's last tiles. Nothing of a launch may touch global memory before its wait.
    gdc_launch_dependents()
    dtype: gl.constexpr = x1.dtype
    warpgroups: gl.constexpr = BLOCK_CO // 64  # that read one stage
    if HALO:
        # Slots of 8 pixels, 1,024 bytes each: where a window may begin.
        slots: gl.constexpr = (BLOCK_H + 2) * BLOCK_W // 8
        x_ring_shape: gl.constexpr = [X_STAGES * slots, 8, BLOCK_K]
    else:
        x_ring_shape: gl.constexpr = [X_STAGES, BLOCK_N * BLOCK_H * BLOCK_W, BLOCK_K]
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, BLOCK_K], dtype)
    x_ring = gl.allocate_shared_memory(dtype, x_ring_shape, rows)
    w_ring = gl.allocate_shared_memory(dtype, [W_STAGES, BLOCK_CO, BLOCK_K], rows)
    outs = gl.allocate_shared_memory(y.dtype, [2] + y.block_type.shape, y.layout)
    smalls = outs
    if POOL:
        smalls = gl.allocate_shared_memory(dtype, [2] + pooled.block_type.shape, pooled.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(X_STAGES):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=warpgroups)
    for i in gl.static_range(W_STAGES):
        mbarrier.init(w_full.index(i), count=1)
        mbarrier.init(w_empty.index(i), count=warpgroups)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    blocks1 = gl.cdiv(C1, BLOCK_K)
    blocks = blocks1
    if TWO_SOURCES:
        blocks = blocks1 + gl.cdiv(C2, BLOCK_K)
    steps = KSIZE * KSIZE // (KSIZE if HALO else 1) * blocks // SPLITS
    pixel_tiles = gl.cdiv(N, BLOCK_N) * gl.cdiv(H, BLOCK_H) * gl.cdiv(W, BLOCK_W)
    tiles = pixel_tiles * gl.cdiv(O, BLOCK_CO) * SPLITS
    gdc_wait()
    gl.warp_specialize([
        (multiply_tiles, (
            bias_ptr, y, pooled, steps, tiles, H, W, O,
            x_ring, x_full, x_empty, w_ring, w_full, w_empty, turns, outs, smalls,
            KSIZE, SLOPE, POOL, HALO, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_K, X_STAGES, W_STAGES, SPLITS, 0,
        )),
        (multiply_tiles, (
            bias_ptr, y, pooled, steps, tiles, H, W, O,
            x_ring, x_full, x_empty, w_ring, w_full, w_empty, turns, outs, smalls,
            KSIZE, SLOPE, POOL, HALO, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_K, X_STAGES, W_STAGES, SPLITS, 1,
        )),
        (load_tiles, (
            x1, x1_tail, w1, x2, x2_tail, w2, blocks1, top, left, steps, tiles, H, W, O,
            x_ring, x_full, x_empty, w_ring, w_full, w_empty,
            KSIZE, TWO_SOURCES, HALO, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_K, X_STAGES, W_STAGES, SPLITS,
        )),
    ], [4, 1], [232, 40])  # fmt: skip


def _descriptor(x: Tensor, box: list[int]) -> TensorDescriptor:
    """TMA boxes of ``x``, the last of whose axes is that of the channels."""
    layout = gl.NVMMASharedLayout.get_default_for(box, getattr(gl, str(x.dtype).removeprefix("torch.")))
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)


def _launch(
    sources: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    pooled: Tensor | None,
    slope: float,
    tf32: bool,
    config: HopperConfig | None,
) -> None:
    """Fill ``y`` (N, O, H, W), of any strides that TMA takes, and ``pooled``. ``weight``: (O, C, K, K)."""
    (n, o, h, w), ksize, dtype = y.shape, weight.shape[-1], sources[0].dtype
    channels = tuple(x.shape[1] for x in sources)
    top, left = ((a - b) // 2 for a, b in zip(y.shape[2:], sources[0].shape[2:], strict=True))
    obstacle = why_not(channels, o, dtype, tf32=tf32, padding=(top, left))
    if obstacle is not None:
        raise ValueError(f"x: the Hopper kernels cannot serve it: {obstacle}")
    if y.numel() == 0:
        return
    if config is None:
        options = {"ksize": ksize, "pool": pooled is not None, "out_dtype": y.dtype}
        config = hopper_configs(channels, o, n, h, w, dtype, **options)[0]
    maps = [tma_ready(x).permute(0, 2, 3, 1) for x in sources]
    rows = packed_weight(weight).view(o, ksize**2, sum(channels))
    rows = rows.clone() if rows.data_ptr() % 16 else rows  # a view of other weights, from an odd element
    width, tile = block_k(dtype), [config.block_n, config.block_h, config.block_w]
    operands = []
    for x, part in zip(maps, rows.split(channels, 2), strict=True):
        operands += [_descriptor(x, [*tile, width]), _descriptor(x, [1, 2, config.block_w, width])]
        operands += [_descriptor(part, [config.block_co, 1, width])]
    shares = small = None
    if config.splits > 1:
        shares = y.new_empty((config.splits, n, h, w, o), dtype=torch.float32)
        out = _descriptor(shares, [1, *tile, 64])
    else:
        out = _descriptor(y.permute(0, 2, 3, 1), [*tile, 64])
        if pooled is not None:
            small = _descriptor(pooled.permute(0, 2, 3, 1), [tile[0], tile[1] // 2, tile[2] // 2, 64])
    grid = min(config.tiles(n, h, w, o), multiprocessors(y.device))
    _conv_fwd_kernel[(grid,)](
        *operands, *(operands if len(maps) == 1 else ()), bias_or_zeros(bias, y), out, small or out,
        n, h, w, o, channels[0], sum(channels[1:]), top, left,
        KSIZE=ksize, TWO_SOURCES=len(maps) == 2, SLOPE=slope, POOL=small is not None, BLOCK_K=width,
        num_warps=4, launch_pdl=True, **config.options(),
    )  # fmt: skip
    if shares is not None:
        sum_splits(shares, bias_or_zeros(bias, y), y, pooled, slope)


@without_graph
def conv_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    slope: float,
    tf32: bool = True,
    config: HopperConfig | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Convolution, bias, activation; ValueError for what :func:`why_not` names."""
    y = empty_channels_last(x, weight.shape[0], x.shape[2], x.shape[3], out_dtype)
    _launch((x,), weight, bias, y, None, slope, tf32, config)
    return y


@without_graph
def conv_pool_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    slope: float,
    tf32: bool = True,
    config: HopperConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`conv_fwd`; returns y and its 2x2 max-pool."""
    y = empty_channels_last(x, weight.shape[0], x.shape[2], x.shape[3])
    pooled = empty_channels_last(x, weight.shape[0], x.shape[2] // 2, x.shape[3] // 2)
    _launch((x,), weight, bias, y, pooled, slope, tf32, config)
    return y, pooled


@without_graph
def upconcat_conv3x3_fwd(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    mode: str,
    align_corners: bool,
    slope: float,
    tf32: bool = True,
    config: HopperConfig | None = None,
) -> Tensor:
    """3x3 convolution of the upsampled x and the skip; x is upsampled in a pass of its own, unless mode is "none"."""
    y = empty_channels_last(skip, weight.shape[0], skip.shape[2], skip.shape[3])
    if mode != "none":
        no_skip, pointwise = skip[:, :0], pointwise_config(x.shape[1], x.dtype)
        x = upsample_concat_fwd(x, no_skip, mode=mode, align_corners=align_corners, config=pointwise)
    _launch((x, skip), weight, bias, y, None, slope, tf32, config)
    return y


@without_graph
def upconcat_conv3x3_commuted_fwd(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    mode: str,
    align_corners: bool,
    slope: float,
    tf32: bool = True,
) -> Tensor:
    """As :func:`upconcat_conv3x3_fwd`, with the upsampling behind the products (../commuted.py)."""
    options = {"mode": mode, "align_corners": align_corners, "slope": slope, "tf32": tf32}
    return commuted.upconcat_conv3x3_commuted_fwd(x, skip, weight, bias, conv=conv_fwd, **options)


@without_graph
def conv_transpose2x2_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    tf32: bool = True,
    config: HopperConfig | None = None,
) -> Tensor:
    """2x2 stride-2 transposed convolution: a 1x1 convolution for each (i, j), stored to every second row and column."""
    y = empty_channels_last(x, weight.shape[1], 2 * x.shape[2], 2 * x.shape[3])
    for i in range(2):
        for j in range(2):
            product = weight[:, :, i : i + 1, j : j + 1].transpose(0, 1)
            _launch((x,), product, bias, y[:, :, i::2, j::2], None, 1.0, tf32, config)
    return y
