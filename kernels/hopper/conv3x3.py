"""Convolution, bias, activation and 2x2 max-pool on Hopper, from one source or two.

    y[n, o, h, w]      = act(b[o] + sum over c, i, j of weight[o, c, i, j] x[n, c, h + i - r, w + j - r])
    pooled[n, o, h, w] = max of the four y[n, o, 2h + {0, 1}, 2w + {0, 1}]
    logits[n, k, h, w] = head_bias[k] + sum over o of head[k, o] y[n, o, h, w]

for K x K filters, K = 1 or 3, r = K // 2, zeros around x; x may be two tensors side by side on channels, which
are never copied together. A 2x2 stride-2 transposed convolution,

    y[n, o, 2h + i, 2w + j] = b[o] + sum over c of weight[c, o, i, j] x[n, c, h, w]

is the product of a 1x1 one whose results are scattered: in a row of y the axes (w, j, o) lie side by side, so that
(j, o) are the channels, and i, the row of the filter, counts tiles (FILTER_ROWS = 2). The launchers are those of
../conv3x3.py and its neighbours, which this file's docstrings do not repeat.

Tiling: a persistent program per multiprocessor takes tile after tile of BLOCK_CO output channels x BLOCK_N images x
BLOCK_H rows x BLOCK_W columns (implicit_gemm.py). SPLITS > 1: a tile is a share of the K loop, written in float32,
and split_k.py sums the shares. Before a norm each tile also leaves count, mean and squared deviations of its pixels,
for which the norm would read the map; ../norm.py merges them, in one order.

Shapes: x (N, C, H, W), weight (O, C, K, K), bias (O,); float16, bfloat16, or float32 in tf32; C and O multiples of
16 bytes. y is of x's dtype, or float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import commuted
from ..norm import Moments, merged_statistics, statistics
from ..tensors import (
    bias_or_zeros,
    described,
    empty_channels_last,
    flipped_weight,
    head_operands,
    no_memory,
    packed_weight,
    scaled,
    without_factors,
    without_graph,
)
from ..tf32 import launch_rounding, rounded_weight, rounding, rounds
from ..tuning import pointwise_config, remembered
from ..upsample_concat import upsample_concat_fwd
from .compat import OVERLAPPING_WINDOWS, TensorDescriptor, gdc_launch_dependents, gdc_wait, gl, gluon, mbarrier
from .implicit_gemm import load_tiles, multiply_tiles
from .split_k import sum_splits
from .tuning import HopperConfig, block_k, hopper_configs, multiprocessors, tma_ready, transpose_configs, why_not


@gluon.jit
def _conv_fwd_kernel(
    x1, x1_tail, w1, x2, x2_tail, w2, bias_ptr, y, pooled, head_ptr, head_bias_ptr, moments_ptr,
    N, H, W, O, C1, C2, top, left,
    KSIZE: gl.constexpr, TWO_SOURCES: gl.constexpr, SCALED: gl.constexpr, SLOPE: gl.constexpr, POOL: gl.constexpr,
    HALO: gl.constexpr, BLOCK_CO: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr,
    BLOCK_K: gl.constexpr, X_STAGES: gl.constexpr, W_STAGES: gl.constexpr, SPLITS: gl.constexpr,
    FILTER_ROWS: gl.constexpr, CLASSES: gl.constexpr, MOMENTS: gl.constexpr,
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
    outs = w_ring
    if not CLASSES:  # else y is a pointer, and nothing goes through shared memory
        outs = gl.allocate_shared_memory(y.dtype, [2] + y.block_type.shape, y.layout)
    smalls = outs
    if POOL:
        smalls = gl.allocate_shared_memory(dtype, [2] + pooled.block_type.shape, pooled.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(X_STAGES):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=warpgroups)
    for i in gl.static_range(W_STAGES):
        mbarrier.init(w_full.index(i), count=1)
        mbarrier.init(w_empty.index(i), count=warpgroups)
    turns = w_empty
    if warpgroups == 1:  # else nobody takes any, and what is never used Triton lays other things over
        turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(turns.index(i), count=1)
    blocks1 = gl.cdiv(C1, BLOCK_K)
    blocks = blocks1
    if TWO_SOURCES:
        blocks = blocks1 + gl.cdiv(C2, BLOCK_K)
    steps = KSIZE * KSIZE // (KSIZE if HALO else 1) * blocks // SPLITS
    pixel_tiles = gl.cdiv(N, BLOCK_N) * gl.cdiv(H, BLOCK_H) * gl.cdiv(W, BLOCK_W)
    tiles = pixel_tiles * gl.cdiv(O, BLOCK_CO) * SPLITS * FILTER_ROWS
    gdc_wait()
    gl.warp_specialize([
        (multiply_tiles, (
            bias_ptr, y, pooled, head_ptr, head_bias_ptr, moments_ptr, steps, tiles, N, H, W, O,
            x_ring, x_full, x_empty, w_ring, w_full, w_empty, turns, outs, smalls,
            KSIZE, SCALED, SLOPE, POOL, HALO, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_K, X_STAGES, W_STAGES, SPLITS,
            FILTER_ROWS, CLASSES, MOMENTS, 0,
        )),
        (multiply_tiles, (
            bias_ptr, y, pooled, head_ptr, head_bias_ptr, moments_ptr, steps, tiles, N, H, W, O,
            x_ring, x_full, x_empty, w_ring, w_full, w_empty, turns, outs, smalls,
            KSIZE, SCALED, SLOPE, POOL, HALO, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_K, X_STAGES, W_STAGES, SPLITS,
            FILTER_ROWS, CLASSES, MOMENTS, 1,
        )),
        (load_tiles, (
            x1, x1_tail, w1, x2, x2_tail, w2, blocks1, top, left, steps, tiles, H, W, O,
            x_ring, x_full, x_empty, w_ring, w_full, w_empty,
            KSIZE, TWO_SOURCES, HALO, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_K, X_STAGES, W_STAGES, SPLITS,
            FILTER_ROWS,
        )),
    ], [4, 1], [232, 40])  # fmt: skip


def _descriptor(x: Tensor, box: list[int], to_tf32: bool = False) -> TensorDescriptor:
    """TMA boxes of ``x``, aligned, the last of whose axes is that of the channels; rounded as they are loaded."""
    return described(x, _checked_descriptor(x.shape, x.stride(), tuple(box), x.dtype, to_tf32))


@remembered
def _checked_descriptor(
    shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], dtype: torch.dtype, to_tf32: bool
) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(list(box), getattr(gl, str(dtype).removeprefix("torch.")))
    return TensorDescriptor(no_memory(dtype), list(shape), list(strides), list(box), layout, **rounding(to_tf32))


def _launch(
    sources: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    pooled: Tensor | None,
    slope: float,
    tf32: bool,
    config: HopperConfig | None,
    head: tuple[Tensor, Tensor] | None = None,
    moments_of: str = "",
) -> Tensor | None:
    """Fill ``y`` (N, O, H, W) and ``pooled``, channels_last, or ``y`` with what a ``head`` makes of it.

    Args:
        weight: (O, C, K, K), or (C, O, 2, 2) transposed.
        head: of :func:`head_operands`.
        moments_of: ``"batch"`` or ``"image"``, of which slabs of moments are wanted.

    Returns:
        What ``merged_statistics`` (../norm.py) takes; None where tiles do not give it: of shares of a K loop, of
        several images in one, and since Triton 3.8 of 256 pixels.
    """
    ksize, dtype = weight.shape[-1], sources[0].dtype
    transposed = ksize == 2
    o = weight.shape[1 if transposed else 0]
    n, _, h, w = sources[-1].shape
    sources = tuple(x for x in sources if x.shape[1])  # a skip may have no channels
    channels = tuple(x.shape[1] for x in sources)
    top, left = ((a - b) // 2 for a, b in zip((h, w), sources[0].shape[2:], strict=True))
    obstacle = why_not(channels, o, dtype, tf32=tf32, padding=(top, left))
    if obstacle is not None:
        raise ValueError(f"x: the Hopper kernels cannot serve it: {obstacle}")
    if transposed:
        without_factors(bias)
    if y.numel() == 0:
        return None
    bias = bias_or_zeros(bias, o, y)
    if config is None and transposed:
        config = transpose_configs(channels, o, n, h, w, dtype)[0]
    elif config is None:
        options = {"ksize": ksize, "pool": pooled is not None, "head": head is not None, "out_dtype": y.dtype}
        config = hopper_configs(channels, o, n, h, w, dtype, **options)[0]
    elif config.splits > 1 and (transposed or head is not None):
        raise ValueError(f"config: expected one that does not split the K loop, got {config}")
    elif head is not None and config.block_co != 64:
        raise ValueError(f"config: expected a tile of 64 channels, which one warpgroup holds, for a head, got {config}")
    maps = [tma_ready(x).permute(0, 2, 3, 1) for x in sources]
    out = y.permute(0, 2, 3, 1)
    if transposed:
        rows = rounded_weight(weight.permute(2, 3, 1, 0).contiguous(), tf32, of=weight)
        rows = rows.view(2, 2 * o, channels[0]).transpose(0, 1)
        out, o = out.view(n, h, 2, w, 2 * o), 2 * o
    else:
        rows = packed_weight(weight, tf32).view(o, ksize**2, sum(channels))
    rows = rows.clone() if rows.data_ptr() % 16 else rows  # a view of other weights, from an odd element
    width, tile = block_k(dtype), [config.block_n, config.block_h, config.block_w]
    to_tf32 = rounds(dtype, tf32)
    operands: list[TensorDescriptor | None] = []
    for x, part in zip(maps, rows.split(channels, 2) if len(maps) == 2 else (rows,), strict=True):
        tail = _descriptor(x, [1, 2, config.block_w, width], to_tf32) if config.halo else None
        operands += [_descriptor(x, [*tile, width], to_tf32), tail, _descriptor(part, [config.block_co, 1, width])]
    shares, box = None, [*tile, 64]
    if config.splits > 1:
        out = shares = y.new_empty((config.splits, n, h, w, o), dtype=torch.float32)
        box.insert(0, 1)
    elif transposed:
        box.insert(2, 1)
    stored, small = y if head is not None else _descriptor(out, box), None
    if pooled is not None and shares is None:
        small = _descriptor(pooled.permute(0, 2, 3, 1), [tile[0], tile[1] // 2, tile[2] // 2, 64])
    moments = None
    # Of 256 pixels they want more registers than there are, by the compiler of Triton 3.9.0.
    fits = OVERLAPPING_WINDOWS or config.block_n * config.block_h * config.block_w <= 128
    if moments_of and fits and config.splits == 1 and (moments_of == "batch" or config.block_n == 1):
        slabs, groups = config.tiles(n, h, w, 1), 1
        if moments_of == "image":
            slabs, groups = slabs // n, n
        moments = torch.empty((slabs, 3, groups, o), dtype=torch.float32, device=y.device)
    filter_rows = 2 if transposed else 1
    grid = min(filter_rows * config.tiles(n, h, w, o), multiprocessors(y.device))
    loads = sum(x is not None for x in operands) if to_tf32 else 0
    launch_rounding(
        loads, _conv_fwd_kernel, (grid,),
        *operands, *((None,) * (6 - len(operands))), bias, stored, small, *(head or (None, None)), moments,
        n, h, w, o, channels[0], sum(channels[1:]), top, left,
        KSIZE=1 if transposed else ksize, TWO_SOURCES=len(maps) == 2, SCALED=scaled(bias), SLOPE=slope,
        POOL=small is not None, BLOCK_K=width, FILTER_ROWS=filter_rows, CLASSES=0 if head is None else len(head[0]),
        MOMENTS=0 if moments is None else 1 if moments_of == "batch" else 2,
        num_warps=4, launch_pdl=True, **config.options(),
    )  # fmt: skip
    if shares is not None:
        sum_splits(shares, bias, y, pooled, slope)
    return moments


def _with_statistics(y: Tensor, moments: Tensor | None, eps: float, per_image: bool) -> Moments:
    found = statistics(y, eps, per_image) if moments is None else merged_statistics(moments, eps, per_image)
    return y, *found


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
def conv_dgrad(g: Tensor, weight: Tensor, *, tf32: bool = True, config: HopperConfig | None = None) -> Tensor:
    """Gradient of the input (N, C, H, W) of a convolution that keeps its map's size, whose sums have the gradient g."""
    return conv_fwd(g, flipped_weight(weight), None, slope=1.0, tf32=tf32, config=config)


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
def conv_moments_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    per_image: bool,
    tf32: bool = True,
    config: HopperConfig | None = None,
) -> Moments:
    """As :func:`conv_fwd` without an activation; statistics from the tiles, where they can be."""
    y = empty_channels_last(x, weight.shape[0], x.shape[2], x.shape[3])
    moments = _launch((x,), weight, bias, y, None, 1.0, tf32, config, moments_of="image" if per_image else "batch")
    return _with_statistics(y, moments, eps, per_image)


@without_graph
def conv_head_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Tensor,
    head_bias: Tensor | None,
    *,
    slope: float,
    tf32: bool = True,
    config: HopperConfig | None = None,
) -> Tensor:
    """As :func:`conv_fwd`, then a 1x1 convolution of what is not rounded: a warpgroup holds all 64 channels."""
    logits = empty_channels_last(x, head.shape[0], x.shape[2], x.shape[3])
    _launch((x,), weight, bias, logits, None, slope, tf32, config, head_operands(head, head_bias))
    return logits


def _upsampled(x: Tensor, skip: Tensor, mode: str, align_corners: bool) -> Tensor:
    if mode == "none":
        return x
    options = {"mode": mode, "align_corners": align_corners, "config": pointwise_config(x.shape[1], x.dtype)}
    return upsample_concat_fwd(x, skip[:, :0], **options)


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
    x = _upsampled(x, skip, mode, align_corners)
    _launch((x, skip), weight, bias, y, None, slope, tf32, config)
    return y


@without_graph
def upconcat_conv3x3_moments_fwd(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    mode: str,
    align_corners: bool,
    eps: float,
    per_image: bool,
    tf32: bool = True,
    config: HopperConfig | None = None,
) -> Moments:
    """As :func:`upconcat_conv3x3_fwd` without an activation, and :func:`conv_moments_fwd`."""
    y = empty_channels_last(skip, weight.shape[0], skip.shape[2], skip.shape[3])
    x = _upsampled(x, skip, mode, align_corners)
    moments = _launch((x, skip), weight, bias, y, None, 1.0, tf32, config, moments_of="image" if per_image else "batch")
    return _with_statistics(y, moments, eps, per_image)


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
def conv_transpose_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    tf32: bool = True,
    config: HopperConfig | None = None,
) -> Tensor:
    """2x2 stride-2 transposed convolution and bias."""
    if weight.shape[2:] != (2, 2):
        raise ValueError(f"weight: expected 2x2 filters, got {tuple(weight.shape)}")
    y = empty_channels_last(x, weight.shape[1], 2 * x.shape[2], 2 * x.shape[3])
    _launch((x,), weight, bias, y, None, 1.0, tf32, config)
    return y
