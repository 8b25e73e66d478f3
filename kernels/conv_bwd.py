"""Gradients of a convolution's input, weight and, where no activation's pass has it, bias.

    grad_x[n, c, h, w]       = sum over o, i, j of weight[o, c, i, j] g[n, o, (h - i + p) / s, (w - j + p) / t]
    grad_weight[o, c, i, j]  = sum over n, h, w of g[n, o, h, w] x[n, c, s h + i - p, t w + j - p]
    grad_bias[o]             = sum over n, h, w of g[n, o, h, w]

g is the gradient before the activation (activation_bwd.py); K x K filters, K = 1 or 3, a stride of (s, t), p zeros
around x; of the first, whole quotients alone.

The first is the forward kernel (conv3x3.py) on the flipped weight, its channels swapped, with K - 1 - p zeros around
g; with a stride it is a transposed convolution (conv_transpose.py). The second is a matrix product over pixels. Of
several sources that were concatenated on channels each is read, and its gradient written, by a launch of its own; the
concatenation never exists.

Tiling of the second: one program computes BLOCK_CO output x BLOCK_C input channels of one tap over
a slab of pixels, BLOCK_N x BLOCK_H x BLOCK_W of them a step. The slabs' sums are added in a fixed
order (reduce_slabs.py). For the few channels of an image all taps share a program. The bias is the
first programs' of a slab, whose pixels they read again, from L2.

Shapes: g (N, O, H, W), x (N, C, H, W), weight (O, C, K, K); float16, bfloat16 or float32, sums in
float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv3x3 import conv_fwd
from .conv_transpose import conv_transpose_fwd
from .implicit_gemm import INTERPRETED, tile_pixels
from .launch import launch
from .reduce_slabs import reduce_slabs
from .stem import STEM_CHANNELS
from .tensors import flipped_weight, placed, unit_channel_stride, without_graph
from .tf32 import rounded_to_tf32
from .tuning import ConvConfig, WgradConfig, slabs, wgrad_configs


@without_graph
def conv_dgrad(
    g: Tensor,
    weight: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    pad: int | None = None,
    size: tuple[int, int] | None = None,
    tf32: bool = True,
    config: ConvConfig | None = None,
) -> Tensor:
    """Gradient of the input, (N, C, H, W), channels_last.

    Args:
        size: (H, W) of the input, which a stride leaves open; without one it is not looked at.
        stride, pad, tf32, config: as in :func:`conv_fwd`.
    """
    ksize = weight.shape[-1]
    pad = ksize // 2 if pad is None else pad
    if stride != (1, 1):
        return conv_transpose_fwd(g, weight, None, stride=stride, pad=pad, size=size, tf32=tf32, config=config)
    return conv_fwd(g, flipped_weight(weight), None, slope=1.0, pad=ksize - 1 - pad, tf32=tf32, config=config)


@triton.jit
def _pixel_sums(
    map_ptr, c, C, slab, steps, N, H, W, stride_n, stride_h, stride_w,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Sum over a slab's pixels of channels ``c`` of a map, in float32."""
    tiles_w, tiles_h = tl.cdiv(W, BLOCK_W), tl.cdiv(H, BLOCK_H)
    total = tl.zeros([c.shape[0]], tl.float32)
    for step in range(0, steps):
        tile = slab * steps + step
        w0, h0 = (tile % tiles_w) * BLOCK_W, (tile // tiles_w % tiles_h) * BLOCK_H
        n, h, w = tile_pixels(tile // tiles_w // tiles_h * BLOCK_N, h0, w0, BLOCK_N, BLOCK_H, BLOCK_W)
        inside = ((n < N) & (h < H) & (w < W))[:, None] & (c < C)[None, :]
        offset = n.to(tl.int64) * stride_n + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
        total += tl.sum(tl.load(map_ptr + offset[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32), 0)
    return total


# A single image, step or row of padding needs no kernel of its own.
@triton.jit(do_not_specialize=["N", "x_top", "x_left", "steps"])
def _conv_wgrad_kernel(
    g_ptr, x_ptr, partial_ptr, sums_ptr,
    N, H, W, O, C, channel0, channels, x_height, x_width, x_top, x_left, steps,
    stride_gn, stride_gh, stride_gw, stride_xn, stride_xc, stride_xh, stride_xw,
    KSIZE: tl.constexpr, PAD: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    ALL_TAPS: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_CO: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, slab = tl.program_id(0), tl.program_id(1)
    blocks_o, blocks_c = tl.cdiv(O, BLOCK_CO), tl.cdiv(C, BLOCK_C)
    co = (block % blocks_o) * BLOCK_CO + tl.arange(0, BLOCK_CO)
    k = tl.arange(0, BLOCK_C)
    if ALL_TAPS:  # (tap, channel), as in the packed weight
        k += block // blocks_o * BLOCK_C
        tap, c = (k // C)[None, :], (k % C)[None, :]
        inside_c = (k < KSIZE * KSIZE * C)[None, :]
    else:
        tap, c = block // blocks_o // blocks_c, ((block // blocks_o % blocks_c) * BLOCK_C + k)[None, :]
        inside_c = c < C
    dh, dw = tap // KSIZE - PAD - x_top, tap % KSIZE - PAD - x_left
    tiles_w, tiles_h = tl.cdiv(W, BLOCK_W), tl.cdiv(H, BLOCK_H)
    acc = tl.zeros([BLOCK_CO, BLOCK_C], tl.float32)
    tl.assume(steps > 0)  # a way around the loop makes the ptxas of Triton 3.6 serialise its WGMMAs
    for step in range(0, steps):
        tile = slab * steps + step
        w0 = (tile % tiles_w) * BLOCK_W
        h0 = (tile // tiles_w % tiles_h) * BLOCK_H
        n, h, w = tile_pixels(tile // tiles_w // tiles_h * BLOCK_N, h0, w0, BLOCK_N, BLOCK_H, BLOCK_W)
        inside = ((n < N) & (h < H) & (w < W))[:, None]
        # int64: one image alone may hold more than 2**31 elements.
        offset = n.to(tl.int64) * stride_gn + h.to(tl.int64) * stride_gh + w.to(tl.int64) * stride_gw
        g = tl.load(g_ptr + offset[:, None] + co[None, :], mask=inside & (co < O)[None, :], other=0.0)
        row, column = (h * STRIDE_H)[:, None] + dh, (w * STRIDE_W)[:, None] + dw
        inside &= (row >= 0) & (row < x_height) & (column >= 0) & (column < x_width)
        offset_x = n.to(tl.int64)[:, None] * stride_xn + row.to(tl.int64) * stride_xh
        offset_x += column.to(tl.int64) * stride_xw
        x = tl.load(x_ptr + offset_x + c.to(tl.int64) * stride_xc, mask=inside & inside_c, other=0.0)
        if INTERPRETED:
            g, x = g.to(tl.float32), x.to(tl.float32)
        elif PRECISION == "tf32":  # not g, which WGMMA would then take from registers
            x = rounded_to_tf32(x)
        acc = tl.dot(g.T, x, acc, input_precision=PRECISION)
    row_of = partial_ptr + (slab.to(tl.int64) * O + co)[:, None] * (KSIZE * KSIZE * channels)
    mask = (co < O)[:, None] & inside_c
    tl.store(row_of + tap * channels + channel0 + c, acc.to(partial_ptr.dtype.element_ty), mask=mask)
    if SUMS == "g":
        if block // blocks_o == 0:
            total = _pixel_sums(
                g_ptr, co, O, slab, steps, N, H, W, stride_gn, stride_gh, stride_gw, BLOCK_N, BLOCK_H, BLOCK_W
            )
            tl.store(sums_ptr + slab.to(tl.int64) * O + co, total, mask=co < O)
    elif SUMS == "x":  # of 1x1 filters
        if block % blocks_o == 0:
            channel = block // blocks_o * BLOCK_C + tl.arange(0, BLOCK_C)
            total = _pixel_sums(
                x_ptr, channel, C, slab, steps, N, H, W, stride_xn, stride_xh, stride_xw, BLOCK_N, BLOCK_H, BLOCK_W
            )
            tl.store(sums_ptr + slab.to(tl.int64) * channels + channel0 + channel, total, mask=channel < C)


@without_graph
def conv_wgrad(
    g: Tensor,
    sources: Sequence[Tensor],
    ksize: int,
    *,
    bias: bool,
    stride: tuple[int, int] = (1, 1),
    pad: int | None = None,
    size: tuple[int, int] | None = None,
    tf32: bool = True,
    config: WgradConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel.

    Args:
        sources: the input, or what was concatenated on channels to it.
        bias: whether the bias gradient is wanted.
        size: (H, W) of the input, the last source's by default; other sources were padded or cropped to it evenly.
        stride, pad, tf32, config: as in :func:`conv_fwd`.

    Returns:
        grad_weight (O, C, ksize, ksize), channels_last; grad_bias (O,) or None.
    """
    pad, size = ksize // 2 if pad is None else pad, size or (sources[-1].shape[2], sources[-1].shape[3])
    weight, sums = wgrad(g, sources, ksize, stride, pad, size, "g" if bias else None, tf32, config)
    return weight, None if sums is None else reduce_slabs(sums, g.dtype)


def wgrad(
    g: Tensor,
    sources: Sequence[Tensor],
    ksize: int,
    stride: tuple[int, int],
    pad: int,
    size: tuple[int, int],
    summed: str | None,
    tf32: bool,
    config: WgradConfig | None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the weight, and of each slab the sums of g's channels (``"g"``) or all sources' (``"x"``)."""
    g = unit_channel_stride(g)
    (n, o, h, w), channels = g.shape, sum(x.shape[1] for x in sources)
    columns, wide = ksize * ksize * channels, channels if summed == "x" else o
    if g.numel() == 0 or columns == 0:
        sums = None if summed is None else torch.zeros((1, wide), dtype=torch.float32, device=g.device)
        return g.new_zeros(o, ksize, ksize, channels).permute(0, 3, 1, 2), sums
    precise = g.dtype == torch.float32 and not tf32
    few = [ksize > 1 and x.shape[1] <= STEM_CHANNELS for x in sources]
    widths = [x.shape[1] * (ksize * ksize if all_taps else 1) for x, all_taps in zip(sources, few, strict=True)]
    tiles = [config] * len(widths) if config else wgrad_configs(widths, o, h, w, g.dtype, precise=precise)
    blocks = [
        (1 if all_taps else ksize * ksize) * triton.cdiv(o, tile.block_co) * triton.cdiv(width, tile.block_c)
        for width, all_taps, tile in zip(widths, few, tiles, strict=True)
    ]
    count, steps = slabs(tiles[0].tiles(n, h, w), sum(blocks))
    # A single slab is the result.
    partial = torch.empty((count, o * columns), dtype=torch.float32 if count > 1 else g.dtype, device=g.device)
    sums = None if summed is None else torch.empty((count, wide), dtype=torch.float32, device=g.device)
    channel0 = 0
    for source, all_taps, tile, programs in zip(sources, few, tiles, blocks, strict=True):
        x, top, left = placed(source if all_taps else unit_channel_stride(source), *size)
        launch(
            _conv_wgrad_kernel, (programs, count),
            g, x, partial, sums, n, h, w, o, x.shape[1], channel0, channels,
            x.shape[2], x.shape[3], top, left, steps,
            g.stride(0), g.stride(2), g.stride(3), *x.stride(),
            KSIZE=ksize, PAD=pad, STRIDE_H=stride[0], STRIDE_W=stride[1],
            ALL_TAPS=all_taps, SUMS=summed if summed == "x" or not channel0 else None,
            PRECISION="tf32" if tf32 else "ieee", **tile.options(),
        )  # fmt: skip
        channel0 += x.shape[1]
    rows = reduce_slabs(partial, g.dtype) if count > 1 else partial
    return rows.view(o, ksize, ksize, channels).permute(0, 3, 1, 2), sums
