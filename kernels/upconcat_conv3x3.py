"""Upsample, concatenate, convolve, add the bias and activate: nothing in between is written.

    y[n, o] = act(b[o] + weight[o, :C1] * pad(up(x))[n] + weight[o, C1:] * skip[n])     (* is 3x3, p zeros around)

The concatenation is two runs of the same loop, one a source. The upsampled pixels are interpolated
on their way to the product, rounded to the dtype that the reference would have stored.

Tiling: as conv3x3.py. ``mode="none"`` takes an x that is upsampled already (a transposed
convolution) and needs no more than its own two-source loop, TMA included.

Shapes: x (N, C1, h, w), skip (N, C2, H, W), weight (O, C1 + C2, 3, 3), bias (O,), or (2, O) as in conv3x3.py ->
y (N, O, H, W), for p = 1; without zeros, p = 0, the result is smaller by 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .implicit_gemm import (
    accumulate,
    add_bias_activate,
    convolved,
    dot,
    load_weights,
    store_tile,
    tile_origin,
    tile_pixels,
)
from .tensors import (
    bias_or_zeros,
    convolved_size,
    empty_channels_last,
    packed_weight,
    pixel_descriptor,
    placed,
    scaled,
    tma_serves,
    unit_channel_stride,
    weight_descriptor,
    without_graph,
)
from .tf32 import launch_rounding, rounds
from .tuning import ConvConfig, capability, conv_config
from .upsample_concat import load_upsampled


@triton.jit
def _accumulate_upsampled(
    acc, x_ptr, w_ptr, co0, O, w_channels,
    n0, h0, w0, N, H, W, C, height, width, top, left, stride_xn, stride_xh, stride_xw,
    PAD: tl.constexpr, MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr,
    BLOCK_CO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc += the 3x3 product with the upsampled x; its channels come first in the weight."""
    n, h, col = tile_pixels(n0, h0, w0, BLOCK_N, BLOCK_H, BLOCK_W)
    origin = n.to(tl.int64) * stride_xn
    steps = tl.cdiv(C, BLOCK_K)
    for k in range(0, 9 * steps):
        tap = k // steps
        c0 = (k % steps) * BLOCK_K
        c = c0 + tl.arange(0, BLOCK_K)
        row, column = h + tap // 3 - PAD, col + tap % 3 - PAD
        u, v = row - top, column - left
        inside = (n < N) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        inside &= (u >= 0) & (u < 2 * height) & (v >= 0) & (v < 2 * width)
        x_tile = load_upsampled(
            x_ptr, origin, c, u, v, inside[:, None] & (c < C)[None, :],
            height, width, stride_xh, stride_xw, MODE, ALIGN_CORNERS,
        ).to(x_ptr.dtype.element_ty)  # fmt: skip
        w_tile = load_weights(
            w_ptr, co0, O - co0, tap * w_channels + c0, 9 * w_channels, C - c0, False, BLOCK_CO, BLOCK_K
        )
        acc = dot(w_tile, x_tile, acc, PRECISION, False)
    return acc


@triton.jit
def _upconcat_conv3x3_fwd_kernel(
    x, skip, w, bias_ptr, y_ptr,
    N, C1, C2, H, W, O, x_height, x_width, top, left,
    stride_xn, stride_xh, stride_xw, stride_sn, stride_sh, stride_sw,
    KSIZE: tl.constexpr, PAD: tl.constexpr, MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr,
    SCALED: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_CO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    y_height, y_width = convolved(H, KSIZE, PAD, 1), convolved(W, KSIZE, PAD, 1)
    n0, h0, w0, co0 = tile_origin(y_height, y_width, O, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W)
    acc = tl.zeros([BLOCK_CO, BLOCK_N * BLOCK_H * BLOCK_W], tl.float32)
    if MODE == "none":
        acc = accumulate(
            acc, x, w, co0, O - co0, 0, C1 + C2,
            n0, h0, w0, N, C1, x_height, x_width, top, left, stride_xn, stride_xh, stride_xw,
            KSIZE, PAD, 1, 1, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_K, USE_TMA, PRECISION,
        )  # fmt: skip
    else:
        acc = _accumulate_upsampled(
            acc, x, w, co0, O, C1 + C2,
            n0, h0, w0, N, H, W, C1, x_height, x_width, top, left, stride_xn, stride_xh, stride_xw,
            PAD, MODE, ALIGN_CORNERS, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_K, PRECISION,
        )  # fmt: skip
    acc = accumulate(
        acc, skip, w, co0, O - co0, C1, C1 + C2,
        n0, h0, w0, N, C2, H, W, 0, 0, stride_sn, stride_sh, stride_sw,
        KSIZE, PAD, 1, 1, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_K, USE_TMA, PRECISION,
    )  # fmt: skip
    acc = add_bias_activate(acc, bias_ptr, co0, O, SCALED, SLOPE, BLOCK_CO)
    n, h, col = tile_pixels(n0, h0, w0, BLOCK_N, BLOCK_H, BLOCK_W)
    store_tile(y_ptr, acc, n, h, col, co0, N, y_height, y_width, O, BLOCK_CO)


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
    pad: int | None = None,
    tf32: bool = True,
    config: ConvConfig | None = None,
) -> Tensor:
    """Launch the kernel.

    Args:
        mode: ``"bilinear"``, ``"nearest"``, or ``"none"`` for an x of the skip's scale, which may
            have 1x1 filters too.
        slope, pad, tf32, config: as in :func:`conv_fwd`.

    Returns:
        y (N, O, H, W), channels_last; smaller by pad.
    """
    x, skip = unit_channel_stride(x), unit_channel_stride(skip)
    c1, (n, c2, h, w), (o, _, ksize, _) = x.shape[1], skip.shape, weight.shape
    pad = ksize // 2 if pad is None else pad
    size = convolved_size(skip, ksize, (1, 1), pad)
    y = empty_channels_last(skip, o, *size)
    if y.numel() == 0:
        return y
    if mode == "none":
        x, top, left = placed(x, h, w)
    else:
        top, left = (h - 2 * x.shape[2]) // 2, (w - 2 * x.shape[3]) // 2
    rows = packed_weight(weight, tf32)
    if config is None:
        tma = mode == "none" and tma_serves(x) and tma_serves(skip)
        config = conv_config(
            (c1, c2), o, *size, x.dtype, capability(x.device),
            precise=x.dtype == torch.float32 and not tf32,
            tma=tma and rows.data_ptr() % 16 == 0,
            interpolating=mode != "none",
        )  # fmt: skip
    launch_rounding(
        3 if config.tma and rounds(x.dtype, tf32) else 0, _upconcat_conv3x3_fwd_kernel, (config.tiles(n, *size, o),),
        pixel_descriptor(x, config, tf32) if config.tma else x,
        pixel_descriptor(skip, config, tf32) if config.tma else skip,
        weight_descriptor(rows, config) if config.tma else rows,
        bias_or_zeros(bias, o, y), y, n, c1, c2, h, w, o, x.shape[2], x.shape[3], top, left,
        x.stride(0), x.stride(2), x.stride(3), skip.stride(0), skip.stride(2), skip.stride(3),
        KSIZE=ksize, PAD=pad, MODE=mode, ALIGN_CORNERS=align_corners, SCALED=scaled(bias), SLOPE=slope,
        USE_TMA=config.tma, PRECISION="tf32" if tf32 else "ieee", **config.options(),
    )  # fmt: skip
    return y
