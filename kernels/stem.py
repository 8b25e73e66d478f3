"""The first convolution of an image: 3x3 filters, 1 to 4 input channels, bias, activation.

    y[n, o, h, w] = act(b[o] + sum over c, i, j of weight[o, c, i, j] x[n, c, s h + i - p, t w + j - p])

for a stride of (s, t) and p zeros around x, as in conv3x3.py.

Tiling: one program computes BLOCK_CO output channels of BLOCK_N x BLOCK_H x BLOCK_W pixels. All
9 * C products of a pixel are one step of at most 64 (9 of 16 for a grey image), so that few
channels are not padded to a whole block of them, nine times over. Writing y is the cost.

Shapes: x (N, C, H, W) of any strides, so images are read as they come; weight (O, C, 3, 3),
bias (O,) or (2, O), as in conv3x3.py; float16, bfloat16 or float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .implicit_gemm import add_bias_activate, convolved, dot, store_tile, tile_origin, tile_pixels
from .launch import launch
from .tensors import bias_or_zeros, convolved_size, empty_channels_last, packed_weight, scaled, without_graph
from .tuning import ConvConfig, stem_config

STEM_CHANNELS = 4


@triton.jit
def _stem_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr,
    N, H, W, O, stride_xn, stride_xc, stride_xh, stride_xw,
    C: tl.constexpr, PAD: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    SCALED: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_CO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    y_height, y_width = convolved(H, 3, PAD, STRIDE_H), convolved(W, 3, PAD, STRIDE_W)
    n0, h0, w0, co0 = tile_origin(y_height, y_width, O, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W)
    n, h, col = tile_pixels(n0, h0, w0, BLOCK_N, BLOCK_H, BLOCK_W)
    k = tl.arange(0, BLOCK_K)  # (tap, channel), as in the packed weight
    row = (h * STRIDE_H)[:, None] + (k // (3 * C) - PAD)[None, :]  # [BLOCK_P, BLOCK_K]
    column = (col * STRIDE_W)[:, None] + (k // C % 3 - PAD)[None, :]
    inside = (n < N)[:, None] & (row >= 0) & (row < H) & (column >= 0) & (column < W) & (k < 9 * C)[None, :]
    offset = n.to(tl.int64)[:, None] * stride_xn + (k % C).to(tl.int64)[None, :] * stride_xc
    offset += row.to(tl.int64) * stride_xh + column.to(tl.int64) * stride_xw
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    co = co0 + tl.arange(0, BLOCK_CO)
    w_mask = (co < O)[:, None] & (k < 9 * C)[None, :]
    w = tl.load(w_ptr + co[:, None] * (9 * C) + k[None, :], mask=w_mask, other=0.0)
    acc = dot(w, x, tl.zeros([BLOCK_CO, BLOCK_N * BLOCK_H * BLOCK_W], tl.float32), PRECISION, False)
    acc = add_bias_activate(acc, bias_ptr, co0, O, SCALED, SLOPE, BLOCK_CO)
    store_tile(y_ptr, acc, n, h, col, co0, N, y_height, y_width, O, BLOCK_CO)


@without_graph
def stem_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    slope: float,
    stride: tuple[int, int] = (1, 1),
    pad: int = 1,
    tf32: bool = True,
    config: ConvConfig | None = None,
) -> Tensor:
    """Launch the kernel; arguments as in :func:`conv_fwd`. Returns y (N, O, H, W), channels_last."""
    n, c, h, w = x.shape
    o, size = weight.shape[0], convolved_size(x, 3, stride, pad)
    y = empty_channels_last(x, o, *size)
    if y.numel() == 0:
        return y
    config = config or stem_config(c, o, *size, precise=x.dtype == torch.float32 and not tf32)
    launch(
        _stem_fwd_kernel, (config.tiles(n, *size, o),),
        x, packed_weight(weight, tf32), bias_or_zeros(bias, o, y), y, n, h, w, o, *x.stride(),
        C=c, PAD=pad, STRIDE_H=stride[0], STRIDE_W=stride[1], SCALED=scaled(bias), SLOPE=slope,
        PRECISION="tf32" if tf32 else "ieee", **config.options(),
    )  # fmt: skip
    return y
