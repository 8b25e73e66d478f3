"""Convolution, bias, activation and 2x2 max-pool in one pass.

    y[n, o, h, w]      = act(b[o] + sum over c, i, j of weight[o, c, i, j] x[n, c, h + i - r, w + j - r])
    pooled[n, o, h, w] = max of the four y[n, o, 2h + {0, 1}, 2w + {0, 1}]

for K x K filters, K = 1 or 3, r = K // 2, zeros around x.

Tiling: one program computes BLOCK_CO output channels of BLOCK_N x BLOCK_H x BLOCK_W pixels; the
loop runs over taps and BLOCK_K channels (implicit_gemm.py). Tiles start on even rows and columns,
so that the pool comes from the same registers.

Shapes: x (N, C, H, W), weight (O, C, K, K), bias (O,); float16, bfloat16 or float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .implicit_gemm import accumulate, add_bias_activate, store_pooled, store_tile, tile_origin, tile_pixels
from .tensors import (
    bias_or_zeros,
    empty_channels_last,
    packed_weight,
    pixel_descriptor,
    tma_serves,
    unit_channel_stride,
    weight_descriptor,
    without_graph,
)
from .tuning import ConvConfig, capability, conv_config


@triton.jit
def _conv_fwd_kernel(
    x, w, bias_ptr, y_ptr, pooled_ptr,
    N, C, H, W, O, stride_xn, stride_xh, stride_xw,
    KSIZE: tl.constexpr, SLOPE: tl.constexpr, POOL: tl.constexpr,
    BLOCK_CO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n0, h0, w0, co0 = tile_origin(H, W, O, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W)
    acc = tl.zeros([BLOCK_CO, BLOCK_N * BLOCK_H * BLOCK_W], tl.float32)
    acc = accumulate(
        acc, x, w, co0, O - co0, 0, C,
        n0, h0, w0, N, H, W, C, H, W, 0, 0, stride_xn, stride_xh, stride_xw,
        KSIZE, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_K, USE_TMA, PRECISION,
    )  # fmt: skip
    acc = add_bias_activate(acc, bias_ptr, co0, O, SLOPE, BLOCK_CO)
    n, h, col = tile_pixels(n0, h0, w0, BLOCK_N, BLOCK_H, BLOCK_W)
    store_tile(y_ptr, acc, n, h, col, co0, N, H, W, O, BLOCK_CO)
    if POOL:
        store_pooled(pooled_ptr, acc, n0, h0, w0, co0, N, H, W, O, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W)


@without_graph
def conv_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    slope: float,
    tf32: bool = True,
    config: ConvConfig | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Convolution, bias, activation.

    Args:
        slope: of the activation for negative values: 0 ReLU, 1 none.
        tf32: round float32 operands to tf32 and use the tensor cores.
        config: a launch configuration other than the tuned one.
        out_dtype: of y; x's by default.

    Returns:
        y (N, O, H, W), channels_last.
    """
    return _launch(x, weight, bias, None, slope, tf32, config, out_dtype)


@without_graph
def conv_pool_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    slope: float,
    tf32: bool = True,
    config: ConvConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`conv_fwd`; returns y and its 2x2 max-pool (N, O, H // 2, W // 2)."""
    pooled = empty_channels_last(x, weight.shape[0], x.shape[2] // 2, x.shape[3] // 2)
    return _launch(x, weight, bias, pooled, slope, tf32, config), pooled


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pooled: Tensor | None,
    slope: float,
    tf32: bool,
    config: ConvConfig | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Fill and return y; fill ``pooled`` too if it is given."""
    x = unit_channel_stride(x)
    n, c, h, w = x.shape
    o, ksize = weight.shape[0], weight.shape[-1]
    y = empty_channels_last(x, o, h, w, out_dtype)
    if y.numel() == 0:
        return y
    rows = packed_weight(weight)
    if config is None:
        config = conv_config(
            (c,), o, h, w, x.dtype, capability(x.device),
            precise=x.dtype == torch.float32 and not tf32,
            tma=tma_serves(x) and rows.data_ptr() % 16 == 0,
        )  # fmt: skip
    _conv_fwd_kernel[(config.tiles(n, h, w, o),)](
        pixel_descriptor(x, config) if config.tma else x,
        weight_descriptor(rows, config) if config.tma else rows,
        bias_or_zeros(bias, y), y, pooled, n, c, h, w, o, x.stride(0), x.stride(2), x.stride(3),
        KSIZE=ksize, SLOPE=slope, POOL=pooled is not None,
        USE_TMA=config.tma, PRECISION="tf32" if tf32 else "ieee", **config.options(),
    )  # fmt: skip
    return y
