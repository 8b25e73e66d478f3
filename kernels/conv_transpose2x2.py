"""2x2 stride-2 transposed convolution and bias: four matrix products, their results interleaved.

    y[n, o, 2h + i, 2w + j] = b[o] + sum over c of x[n, c, h, w] weight[c, o, i, j]

The stride equals the filter, so nothing overlaps: each (i, j) is a 1x1 convolution of its own.

Tiling: one program computes BLOCK_CO output channels of BLOCK_N x BLOCK_H x BLOCK_W input pixels
for one (i, j), and stores them to every second row and column.

Shapes: x (N, C, H, W), weight (C, O, 2, 2), bias (O,) -> y (N, O, 2H, 2W), channels_last; float16,
bfloat16 or float32. The weight is read as (i, j, o, c), contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .implicit_gemm import accumulate, add_bias_activate, store_tile, tile_origin, tile_pixels
from .tensors import (
    bias_or_zeros,
    empty_channels_last,
    pixel_descriptor,
    tma_serves,
    unit_channel_stride,
    weight_descriptor,
    without_graph,
)
from .tuning import ConvConfig, capability, conv_config


@triton.jit
def _conv_transpose2x2_fwd_kernel(
    x, w, bias_ptr, y_ptr,
    N, C, H, W, O, stride_xn, stride_xh, stride_xw,
    BLOCK_CO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n0, h0, w0, co0 = tile_origin(H, W, O, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W)
    tap = tl.program_id(1)
    acc = tl.zeros([BLOCK_CO, BLOCK_N * BLOCK_H * BLOCK_W], tl.float32)
    acc = accumulate(
        acc, x, w, tap * O + co0, O - co0, 0, C,
        n0, h0, w0, N, H, W, C, H, W, 0, 0, stride_xn, stride_xh, stride_xw,
        1, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_K, USE_TMA, PRECISION,
    )  # fmt: skip
    acc = add_bias_activate(acc, bias_ptr, co0, O, 1.0, BLOCK_CO)
    n, h, col = tile_pixels(n0, h0, w0, BLOCK_N, BLOCK_H, BLOCK_W)
    store_tile(y_ptr, acc, n, 2 * h + tap // 2, 2 * col + tap % 2, co0, N, 2 * H, 2 * W, O, BLOCK_CO)


@without_graph
def conv_transpose2x2_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    tf32: bool = True,
    config: ConvConfig | None = None,
) -> Tensor:
    """Launch the kernel; ``tf32`` and ``config`` as in :func:`conv_fwd`. Returns y (N, O, 2H, 2W)."""
    x = unit_channel_stride(x)
    n, c, h, w = x.shape
    o = weight.shape[1]
    y = empty_channels_last(x, o, 2 * h, 2 * w)
    if y.numel() == 0:
        return y
    rows = weight.permute(2, 3, 1, 0).reshape(4 * o, c).contiguous()
    if config is None:
        config = conv_config(
            (c,), o, h, w, x.dtype, capability(x.device),
            precise=x.dtype == torch.float32 and not tf32,
            tma=tma_serves(x) and rows.data_ptr() % 16 == 0,
        )  # fmt: skip
    _conv_transpose2x2_fwd_kernel[(config.tiles(n, h, w, o), 4)](
        pixel_descriptor(x, config) if config.tma else x,
        weight_descriptor(rows, config) if config.tma else rows,
        bias_or_zeros(bias, y), y, n, c, h, w, o, x.stride(0), x.stride(2), x.stride(3),
        USE_TMA=config.tma, PRECISION="tf32" if tf32 else "ieee", **config.options(),
    )  # fmt: skip
    return y
