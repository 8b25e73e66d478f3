"""Convolution, bias, activation and 2x2 max-pool, or a network's 1x1 head, in one pass.

    y[n, o, h, w]      = act(b[o] + sum over c, i, j of weight[o, c, i, j] x[n, c, s h + i - p, t w + j - p])
    pooled[n, o, h, w] = max of the four y[n, o, 2h + {0, 1}, 2w + {0, 1}]
    logits[n, k, h, w] = head_bias[k] + sum over o of head[k, o] y[n, o, h, w]

for K x K filters, K = 1 or 3, a stride of (s, t), p zeros around x: s = t = 1 and p = K // 2 keep the size.

Tiling: one program computes BLOCK_CO output channels of BLOCK_N x BLOCK_H x BLOCK_W pixels; the
loop runs over taps and BLOCK_K channels (implicit_gemm.py). Tiles start on even rows and columns,
so that the pool comes from the same registers. TMA boxes are of neighbours, so a stride takes pointers.
A head is of a tile that holds all output channels; y is then never written.

Shapes: x (N, C, H, W), weight (O, C, K, K), bias (O,); float16, bfloat16 or float32. Or bias (2, O), of
float32 or of x's dtype: the first row are factors of the sums, a batch norm's, which 16-bit weights would round.
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
    store_head,
    store_pooled,
    store_tile,
    tile_origin,
    tile_pixels,
)
from .tensors import (
    bias_or_zeros,
    convolved_size,
    empty_channels_last,
    head_operands,
    packed_weight,
    pixel_descriptor,
    scaled,
    tma_serves,
    unit_channel_stride,
    weight_descriptor,
    without_graph,
)
from .tf32 import launch_rounding, rounds
from .tuning import ConvConfig, capability, conv_config


@triton.jit
def _conv_fwd_kernel(
    x, w, bias_ptr, y_ptr, pooled_ptr, head_ptr, head_bias_ptr,
    N, C, H, W, O, stride_xn, stride_xh, stride_xw,
    KSIZE: tl.constexpr, PAD: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    SCALED: tl.constexpr, SLOPE: tl.constexpr, POOL: tl.constexpr, CLASSES: tl.constexpr,
    BLOCK_CO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    y_height, y_width = convolved(H, KSIZE, PAD, STRIDE_H), convolved(W, KSIZE, PAD, STRIDE_W)
    n0, h0, w0, co0 = tile_origin(y_height, y_width, O, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W)
    acc = tl.zeros([BLOCK_CO, BLOCK_N * BLOCK_H * BLOCK_W], tl.float32)
    acc = accumulate(
        acc, x, w, co0, O - co0, 0, C,
        n0, h0, w0, N, C, H, W, 0, 0, stride_xn, stride_xh, stride_xw,
        KSIZE, PAD, STRIDE_H, STRIDE_W, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_K, USE_TMA, PRECISION,
    )  # fmt: skip
    acc = add_bias_activate(acc, bias_ptr, co0, O, SCALED, SLOPE, BLOCK_CO)
    n, h, col = tile_pixels(n0, h0, w0, BLOCK_N, BLOCK_H, BLOCK_W)
    if CLASSES:
        store_head(
            y_ptr, acc, head_ptr, head_bias_ptr, n, h, col, N, y_height, y_width, O, CLASSES, BLOCK_CO, PRECISION
        )  # fmt: skip
    else:
        store_tile(y_ptr, acc, n, h, col, co0, N, y_height, y_width, O, BLOCK_CO)
    if POOL:
        store_pooled(pooled_ptr, acc, n0, h0, w0, co0, N, y_height, y_width, O, BLOCK_CO, BLOCK_N, BLOCK_H, BLOCK_W)


@without_graph
def conv_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    slope: float,
    stride: tuple[int, int] = (1, 1),
    pad: int | None = None,
    tf32: bool = True,
    config: ConvConfig | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Convolution, bias, activation.

    Args:
        slope: of the activation for negative values: 0 ReLU, 1 none.
        stride: (rows, columns). pad: zeros on each side, K // 2 by default.
        tf32: round float32 operands to tf32 and use the tensor cores.
        config: a launch configuration other than the tuned one.
        out_dtype: of y; x's by default.

    Returns:
        y (N, O, H, W), channels_last; smaller by stride and pad.
    """
    pad = weight.shape[-1] // 2 if pad is None else pad
    y = empty_channels_last(x, weight.shape[0], *convolved_size(x, weight.shape[-1], stride, pad), out_dtype)
    _launch(x, weight, bias, y, None, slope, stride, pad, tf32, config)
    return y


@without_graph
def conv_pool_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    slope: float,
    pad: int | None = None,
    tf32: bool = True,
    config: ConvConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`conv_fwd`; returns y and its 2x2 max-pool (N, O, H // 2, W // 2)."""
    pad, stride = weight.shape[-1] // 2 if pad is None else pad, (1, 1)
    height, width = convolved_size(x, weight.shape[-1], stride, pad)
    y = empty_channels_last(x, weight.shape[0], height, width)
    pooled = empty_channels_last(x, weight.shape[0], height // 2, width // 2)
    _launch(x, weight, bias, y, pooled, slope, stride, pad, tf32, config)
    return y, pooled


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
    config: ConvConfig | None = None,
) -> Tensor:
    """As :func:`conv_fwd`, then a 1x1 convolution; y itself is not written.

    Args:
        head: (K, O, 1, 1), K and O at most ``HEAD_CLASSES`` and ``HEAD_CHANNELS``. head_bias: (K,) or None.

    Returns:
        logits (N, K, H, W), channels_last.
    """
    logits = empty_channels_last(x, head.shape[0], x.shape[2], x.shape[3])
    pad, operands = weight.shape[-1] // 2, head_operands(head, head_bias)
    _launch(x, weight, bias, logits, None, slope, (1, 1), pad, tf32, config, operands)
    return logits


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    pooled: Tensor | None,
    slope: float,
    stride: tuple[int, int],
    pad: int,
    tf32: bool,
    config: ConvConfig | None,
    head: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill y, and ``pooled`` if it is given; or y with what a ``head`` of :func:`head_operands` makes of it."""
    if y.numel() == 0:
        return
    x = unit_channel_stride(x)
    (n, c, h, w), (height, width), o = x.shape, y.shape[2:], weight.shape[0]
    rows = packed_weight(weight, tf32)
    if config is None:
        config = conv_config(
            (c,), o, height, width, x.dtype, capability(x.device),
            precise=x.dtype == torch.float32 and not tf32, whole=head is not None,
            tma=stride == (1, 1) and tma_serves(x) and rows.data_ptr() % 16 == 0,
        )  # fmt: skip
    if config.tma and stride != (1, 1):
        raise ValueError(f"config: expected one of pointers, for a stride of {stride}, got {config}")
    if head is not None and config.block_co < o:
        raise ValueError(f"config: expected a tile of all {o} channels, for a head, got {config}")
    launch_rounding(
        2 if config.tma and rounds(x.dtype, tf32) else 0, _conv_fwd_kernel, (config.tiles(n, height, width, o),),
        pixel_descriptor(x, config, tf32) if config.tma else x,
        weight_descriptor(rows, config) if config.tma else rows,
        bias_or_zeros(bias, o, y), y, pooled, *(head or (None, None)),
        n, c, h, w, o, x.stride(0), x.stride(2), x.stride(3),
        KSIZE=weight.shape[-1], PAD=pad, STRIDE_H=stride[0], STRIDE_W=stride[1],
        SCALED=scaled(bias), SLOPE=slope, POOL=pooled is not None, CLASSES=0 if head is None else len(head[0]),
        USE_TMA=config.tma, PRECISION="tf32" if tf32 else "ieee", **config.options(),
    )  # fmt: skip
