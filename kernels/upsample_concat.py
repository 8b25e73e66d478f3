"""Upsample by two and concatenate with the skip, in one pass over memory.

    y[n, :C1, h, w] = up(x)[n, :, h - top, w - left], zero outside the upsampled map
    y[n, C1:, h, w] = skip[n, :, h, w]

Nearest: up(x)[2i + d] = x[i]. Bilinear, per axis of S pixels (torch's two conventions differ in t):

    up(x)[2i]     = t x[i - 1] + (1 - t) x[i]        (i = 0: x[0])
    up(x)[2i + 1] = (1/2 + t) x[i] + (1/2 - t) x[i + 1]    (i = S - 1: x[S - 1])
    t = 1/4 with align_corners=False,  t(u) = u / (4S - 2) at output u with align_corners=True

The second is u (S - 1) / (2S - 1) rewritten: the source pixel follows from u's parity alone, so no
rounding can pick the wrong one, at any size.

Tiling: one program writes BLOCK_P pixels x BLOCK_C channels, either of the upsampled half or of
the skip's. Shapes: x (N, C1, h, w), skip (N, C2, H, W) of any strides -> y (N, C1 + C2, H, W),
channels_last; float16, bfloat16 or float32. Interpolation is in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tensors import empty_channels_last, without_graph
from .tuning import PointwiseConfig, pointwise_config


@triton.jit
def source_pixels(u, SIZE, ALIGN_CORNERS: tl.constexpr):
    """The two source pixels of upsampled pixel ``u`` on an axis of SIZE, and the second's weight."""
    i = u // 2
    odd = u % 2
    if ALIGN_CORNERS:
        t = u.to(tl.float32) / (4 * SIZE - 2)
    else:
        t = tl.full(u.shape, 0.25, tl.float32)
    first = tl.maximum(i - 1 + odd, 0)
    second = tl.minimum(first + 1, SIZE - 1)
    # At the first pixel both sources are x[0]; the weight is then set to 0 so that it is exact.
    weight = tl.where(odd == 1, 0.5 - t, tl.where(i == 0, 0.0, 1.0 - t))
    return first, second, weight


@triton.jit
def load_upsampled(
    x_ptr, origin, channel_offset, u, v, mask, height, width, stride_h, stride_w,
    MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr,
):  # fmt: skip
    """float32 [P, C] of the upsampled map at rows ``u`` and columns ``v`` [P].

    ``origin`` [P] and ``channel_offset`` [C] are the offsets of each image and channel. Rows and
    columns outside the map must be masked by ``mask`` [P, C]; they read as zero.
    """
    if MODE == "nearest":
        offset = origin + (u // 2).to(tl.int64) * stride_h + (v // 2).to(tl.int64) * stride_w
        value = tl.load(x_ptr + offset[:, None] + channel_offset[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        h0, h1, fh = source_pixels(u, height, ALIGN_CORNERS)
        w0, w1, fw = source_pixels(v, width, ALIGN_CORNERS)
        row0 = origin + h0.to(tl.int64) * stride_h
        row1 = origin + h1.to(tl.int64) * stride_h
        column0 = w0.to(tl.int64) * stride_w
        column1 = w1.to(tl.int64) * stride_w
        channels = channel_offset[None, :]
        x00 = tl.load(x_ptr + (row0 + column0)[:, None] + channels, mask=mask, other=0.0).to(tl.float32)
        x01 = tl.load(x_ptr + (row0 + column1)[:, None] + channels, mask=mask, other=0.0).to(tl.float32)
        x10 = tl.load(x_ptr + (row1 + column0)[:, None] + channels, mask=mask, other=0.0).to(tl.float32)
        x11 = tl.load(x_ptr + (row1 + column1)[:, None] + channels, mask=mask, other=0.0).to(tl.float32)
        top = (1 - fw)[:, None] * x00 + fw[:, None] * x01
        bottom = (1 - fw)[:, None] * x10 + fw[:, None] * x11
        value = (1 - fh)[:, None] * top + fh[:, None] * bottom
    return value


@triton.jit
def _upsample_concat_fwd_kernel(
    x_ptr, skip_ptr, y_ptr,
    pixels, C1, C2, h, w, H, W, top, left,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_sn, stride_sc, stride_sh, stride_sw,
    MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks1 = tl.cdiv(C1, BLOCK_C)
    blocks = blocks1 + tl.cdiv(C2, BLOCK_C)
    block = tl.program_id(0) % blocks
    pixel = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = pixel // W // H
    row = (pixel // W % H).to(tl.int32)
    column = (pixel % W).to(tl.int32)
    y_row = y_ptr + pixel[:, None] * (C1 + C2)
    if block < blocks1:
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (pixel < pixels)[:, None] & (c < C1)[None, :]
        u, v = row - top, column - left
        inside = (u >= 0) & (u < 2 * h) & (v >= 0) & (v < 2 * w)
        upsampled = load_upsampled(
            x_ptr, n * stride_xn, c.to(tl.int64) * stride_xc, u, v, mask & inside[:, None],
            h, w, stride_xh, stride_xw, MODE, ALIGN_CORNERS,
        )  # fmt: skip
        tl.store(y_row + c[None, :], upsampled.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        c = (block - blocks1) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (pixel < pixels)[:, None] & (c < C2)[None, :]
        offset = n * stride_sn + row.to(tl.int64) * stride_sh + column.to(tl.int64) * stride_sw
        copied = tl.load(skip_ptr + offset[:, None] + (c.to(tl.int64) * stride_sc)[None, :], mask=mask, other=0.0)
        tl.store(y_row + C1 + c[None, :], copied, mask=mask)


@without_graph
def upsample_concat_fwd(
    x: Tensor,
    skip: Tensor,
    *,
    mode: str,
    align_corners: bool,
    config: PointwiseConfig | None = None,
) -> Tensor:
    """Launch the kernel. ``mode``: ``"bilinear"`` or ``"nearest"``. Returns y, channels_last."""
    n, c1, h, w = x.shape
    c2, height, width = skip.shape[1:]
    y = empty_channels_last(skip, c1 + c2, height, width)
    if y.numel() == 0:
        return y
    config = config or pointwise_config(min(c1, c2), x.dtype)
    pixels = n * height * width
    blocks = triton.cdiv(c1, config.block_c) + triton.cdiv(c2, config.block_c)
    launch(
        _upsample_concat_fwd_kernel, (triton.cdiv(pixels, config.block_p) * blocks,),
        x, skip, y, pixels, c1, c2, h, w, height, width, (height - 2 * h) // 2, (width - 2 * w) // 2,
        *x.stride(), *skip.stride(),
        MODE=mode, ALIGN_CORNERS=align_corners, **config.options(),
    )  # fmt: skip
    return y


@without_graph
def upsample_fwd(x: Tensor, height: int, width: int, *, mode: str, align_corners: bool) -> Tensor:
    """The upsampled map alone, (N, C1, height, width): the kernel with a skip of no channels."""
    nothing = x.new_empty((x.shape[0], 0, height, width))
    config = pointwise_config(x.shape[1], x.dtype)
    return upsample_concat_fwd(x, nothing, mode=mode, align_corners=align_corners, config=config)
