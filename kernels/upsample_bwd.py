"""Gradient of upsampling by two, as a gather: every sum has one program and one order.

    grad_x[n, c, i, j] = sum over u, v of a[u, i] a[v, j] grad[n, c, u + top, v + left]

a[u, i] is the weight of source pixel i in upsampled pixel u (upsample_concat.py), nonzero at most
for the four u from 2i - 1 to 2i + 2. Rows and columns of the upsampled map that were cropped away
have no gradient, and padding passes none on.

Tiling: one program computes BLOCK_P pixels x BLOCK_C channels. Shapes: grad (N, C, H, W) of any
strides -> grad_x (N, C, h, w), channels_last; float16, bfloat16 or float32, sums in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tensors import empty_channels_last, without_graph
from .tuning import PointwiseConfig, gather_config
from .upsample_concat import source_pixels


@triton.jit
def _weight(u, i, SIZE, MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr):
    """a[u, i] on an axis of SIZE source pixels."""
    if MODE == "nearest":
        weight = tl.where(u // 2 == i, 1.0, 0.0)
    else:
        first, second, share = source_pixels(u, SIZE, ALIGN_CORNERS)
        weight = tl.where(first == i, 1.0 - share, 0.0) + tl.where(second == i, share, 0.0)
    return weight


@triton.jit
def _upsample_bwd_kernel(
    grad_ptr, grad_x_ptr,
    pixels, C, h, w, H, W, top, left, stride_gn, stride_gc, stride_gh, stride_gw,
    MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = pixel // w // h
    i, j = (pixel // w % h).to(tl.int32), (pixel % w).to(tl.int32)
    here = (pixel < pixels)[:, None] & (c < C)[None, :]
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    # Nearest has its two pixels at 2i and 2i + 1.
    FIRST: tl.constexpr = 0 if MODE == "nearest" else -1
    COUNT: tl.constexpr = 2 if MODE == "nearest" else 4
    for du in tl.static_range(COUNT):
        u = 2 * i + du + FIRST
        row = u + top
        weight_h = _weight(u, i, h, MODE, ALIGN_CORNERS)
        inside_h = (u >= 0) & (u < 2 * h) & (row >= 0) & (row < H)
        for dv in tl.static_range(COUNT):
            v = 2 * j + dv + FIRST
            column = v + left
            weight = weight_h * _weight(v, j, w, MODE, ALIGN_CORNERS)
            inside = inside_h & (v >= 0) & (v < 2 * w) & (column >= 0) & (column < W)
            offset = n * stride_gn + row.to(tl.int64) * stride_gh + column.to(tl.int64) * stride_gw
            offset = offset[:, None] + c.to(tl.int64)[None, :] * stride_gc
            grad = tl.load(grad_ptr + offset, mask=here & inside[:, None], other=0.0).to(tl.float32)
            acc += weight[:, None] * grad
    tl.store(grad_x_ptr + pixel[:, None] * C + c[None, :], acc.to(grad_x_ptr.dtype.element_ty), mask=here)


@without_graph
def upsample_bwd(
    grad: Tensor, height: int, width: int, *, mode: str, align_corners: bool, config: PointwiseConfig | None = None
) -> Tensor:
    """Launch the kernel.

    Args:
        grad: (N, C, H, W), gradient of the upsampled map, padded or cropped to H x W.
        height, width: of the map before it was upsampled.
        mode: ``"bilinear"`` or ``"nearest"``.

    Returns:
        grad_x (N, C, height, width), channels_last.
    """
    n, c, h, w = grad.shape
    grad_x = empty_channels_last(grad, c, height, width)
    if grad_x.numel() == 0:
        return grad_x
    config = config or gather_config(c)
    pixels = n * height * width
    launch(
        _upsample_bwd_kernel, (triton.cdiv(pixels, config.block_p) * triton.cdiv(c, config.block_c),),
        grad, grad_x, pixels, c, height, width, h, w, (h - 2 * height) // 2, (w - 2 * width) // 2, *grad.stride(),
        MODE=mode, ALIGN_CORNERS=align_corners, **config.options(),
    )  # fmt: skip
    return grad_x
