"""Transposed convolution and bias: what scatters a pixel over a filter, gathered.

    y[n, o, u, v] = b[o] + sum over c and the taps (i, j) with u = s h + i - p, v = t w + j - p
                           of x[n, c, h, w] weight[c, o, i, j]

for a stride of (s, t). It is a decoder's upsampling, whose stride is the filter's size: nothing overlaps, each
pixel of y meets one tap. And it is the gradient of a strided convolution's input, p the zeros around that.

Tiling: pixels of y with the same (u mod s, v mod t) meet the same taps. One program computes BLOCK_CO output
channels of BLOCK_N x BLOCK_H x BLOCK_W of them, and stores them to every s-th row and t-th column.

Shapes: x (N, C, H, W), weight (C, O, R, S), bias (O,) -> y (N, O, s H, t W) or as large as asked for, channels_last;
float16, bfloat16 or float32. The weight is read as (i, j, o, c), contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .implicit_gemm import add_bias_activate, dot, load_weights, store_tile, tile_origin, tile_pixels
from .tensors import (
    bias_or_zeros,
    empty_channels_last,
    pixel_descriptor,
    tma_serves,
    unit_channel_stride,
    weight_descriptor,
    without_factors,
    without_graph,
)
from .tf32 import launch_rounding, rounded_weight, rounds
from .tuning import ConvConfig, capability, conv_config


@triton.jit
def _conv_transpose_fwd_kernel(
    x, w, bias_ptr, y_ptr,
    N, C, H, W, O, y_height, y_width, stride_xn, stride_xh, stride_xw,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PAD: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    BLOCK_CO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n0, h0, w0, co0 = tile_origin(
        tl.cdiv(y_height, STRIDE_H), tl.cdiv(y_width, STRIDE_W), O, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W
    )
    row_of_y, column_of_y = tl.program_id(1) // STRIDE_W, tl.program_id(1) % STRIDE_W
    # The first tap that these pixels meet, and how many they do; the row of x that is under the first.
    i0, j0 = (row_of_y + PAD) % STRIDE_H, (column_of_y + PAD) % STRIDE_W
    rows, columns = tl.cdiv(ROWS - i0, STRIDE_H), tl.cdiv(COLUMNS - j0, STRIDE_W)
    top, left = (row_of_y + PAD) // STRIDE_H, (column_of_y + PAD) // STRIDE_W
    n, h, col = tile_pixels(n0, h0, w0, BLOCK_N, BLOCK_H, BLOCK_W)
    # int64: one image alone may hold more than 2**31 elements.
    origin = n.to(tl.int64) * stride_xn + (h + top).to(tl.int64) * stride_xh + (col + left).to(tl.int64) * stride_xw
    acc = tl.zeros([BLOCK_CO, BLOCK_N * BLOCK_H * BLOCK_W], tl.float32)
    steps = tl.cdiv(C, BLOCK_K)
    for k in range(0, rows * columns * steps):
        tap = k // steps
        c0 = (k % steps) * BLOCK_K
        di, dj = tap // columns, tap % columns
        if USE_TMA:
            x_tile = x.load([n0, h0 + top - di, w0 + left - dj, c0]).reshape(BLOCK_N * BLOCK_H * BLOCK_W, BLOCK_K)
        else:
            c = c0 + tl.arange(0, BLOCK_K)
            row, column = h + top - di, col + left - dj
            inside = (n < N) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            offset = origin - di.to(tl.int64) * stride_xh - dj.to(tl.int64) * stride_xw
            x_tile = tl.load(
                x + offset[:, None] + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0
            )  # [BLOCK_P, BLOCK_K]
        w_row = ((i0 + di * STRIDE_H) * COLUMNS + j0 + dj * STRIDE_W) * O + co0
        w_tile = load_weights(w, w_row, O - co0, c0, C, C - c0, USE_TMA, BLOCK_CO, BLOCK_K)
        acc = dot(w_tile, x_tile, acc, PRECISION, USE_TMA)
    acc = add_bias_activate(acc, bias_ptr, co0, O, False, 1.0, BLOCK_CO)
    store_tile(
        y_ptr, acc, n, STRIDE_H * h + row_of_y, STRIDE_W * col + column_of_y, co0, N, y_height, y_width, O, BLOCK_CO
    )


@without_graph
def conv_transpose_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, int] | None = None,
    pad: int = 0,
    size: tuple[int, int] | None = None,
    tf32: bool = True,
    config: ConvConfig | None = None,
) -> Tensor:
    """Launch the kernel.

    Args:
        stride: (rows, columns), the filter's size by default. pad: rows and columns of y that are cut on each side.
        size: (H, W) of y, by default the stride times those of x.
        tf32, config: as in :func:`conv_fwd`.

    Returns:
        y (N, O, H, W), channels_last.
    """
    without_factors(bias)
    x = unit_channel_stride(x)
    (n, c, h, w), (_, o, *filter_size) = x.shape, weight.shape
    step = stride or tuple(filter_size)
    y = empty_channels_last(x, o, *(size or (step[0] * h, step[1] * w)))
    if y.numel() == 0:
        return y
    rows = rounded_weight(weight.permute(2, 3, 1, 0).reshape(-1, c).contiguous(), tf32, of=weight)
    cells = triton.cdiv(y.shape[2], step[0]), triton.cdiv(y.shape[3], step[1])
    if config is None:
        config = conv_config(
            (c,), o, *cells, x.dtype, capability(x.device),
            precise=x.dtype == torch.float32 and not tf32,
            tma=tma_serves(x) and rows.data_ptr() % 16 == 0,
        )  # fmt: skip
    launch_rounding(
        2 if config.tma and rounds(x.dtype, tf32) else 0,
        _conv_transpose_fwd_kernel, (config.tiles(n, *cells, o), step[0] * step[1]),
        pixel_descriptor(x, config, tf32) if config.tma else x,
        weight_descriptor(rows, config) if config.tma else rows,
        bias_or_zeros(bias, o, y), y, n, c, h, w, o, *y.shape[2:], x.stride(0), x.stride(2), x.stride(3),
        ROWS=filter_size[0], COLUMNS=filter_size[1], PAD=pad, STRIDE_H=step[0], STRIDE_W=step[1],
        USE_TMA=config.tma, PRECISION="tf32" if tf32 else "ieee", **config.options(),
    )  # fmt: skip
    return y
