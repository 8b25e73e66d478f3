"""A decoder's first convolution with the upsampling behind its products: 4x fewer of them on the upsampled channels.

    y[n, o, u, v] = act(t[n, o, u, v] + sum over taps (i, j) of pad(up(z_ij))[n, o, u + i - 1, v + j - 1])
    z_ij = weight[:, :C1, i, j] x    at x's resolution, t = b + weight[:, C1:] * skip    (* is 3x3, zeros around)

which is exact, for a product mixes channels and ``up`` mixes pixels. z and t are two convolutions of
conv3x3.py or hopper/conv3x3.py, kept in float32 so that nothing is rounded twice; what is left is a gather.

Tiling: one program makes BLOCK_P pixels x BLOCK_C channels, of 36 reads each (9 for nearest).

Shapes: x (N, C1, h, w), skip (N, C2, H, W), weight (O, C1 + C2, 3, 3), bias (O,), or (2, O) as in conv3x3.py ->
y (N, O, H, W); float16, bfloat16 or float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv3x3 import conv_fwd
from .implicit_gemm import activate
from .launch import launch
from .tensors import bias_or_zeros, empty_channels_last, scaled, without_graph
from .tf32 import marked_as_rounded
from .tuning import gather_config
from .upsample_concat import load_upsampled


@triton.jit
def _gather_taps_kernel(
    z_ptr, t_ptr, y_ptr, pixels, O, h, w, H, W, top, left,
    MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, SLOPE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(O, BLOCK_C)
    pixel = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    origin = (pixel // W // H) * h * w * 9 * O
    row = (pixel // W % H).to(tl.int32)
    column = (pixel % W).to(tl.int32)
    mask = (pixel < pixels)[:, None] & (c < O)[None, :]
    offset = pixel[:, None] * O + c[None, :]
    acc = tl.load(t_ptr + offset, mask=mask, other=0.0)
    for tap in range(9):
        # Where the tap stands in the padded map, which is zero around, and from there in the upsampled one.
        i, j = row + tap // 3 - 1, column + tap % 3 - 1
        u, v = i - top, j - left
        inside = (i >= 0) & (i < H) & (j >= 0) & (j < W) & (u >= 0) & (u < 2 * h) & (v >= 0) & (v < 2 * w)
        acc += load_upsampled(
            z_ptr, origin, tap * O + c, u, v, mask & inside[:, None], h, w, w * 9 * O, 9 * O, MODE, ALIGN_CORNERS
        )
    tl.store(y_ptr + offset, activate(acc, SLOPE).to(y_ptr.dtype.element_ty), mask=mask)


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
    conv: Callable[..., Tensor] = conv_fwd,
) -> Tensor:
    """Launch the two convolutions and the gather.

    Args and result: those of :func:`upconcat_conv3x3_fwd`, whose sums in another order these are;
    ``mode`` is ``"bilinear"`` or ``"nearest"``, ``conv`` the launcher of the convolutions.
    """
    (_, c1, h, w), (n, c2, height, width), o = x.shape, skip.shape, weight.shape[0]
    y = empty_channels_last(skip, o, height, width)
    if y.numel() == 0:
        return y
    taps = marked_as_rounded(weight[:, :c1].permute(2, 3, 0, 1).reshape(9 * o, c1, 1, 1), of=weight)
    factors = None
    if bias is not None and scaled(bias):  # of the sums of both
        factors = torch.stack([bias[0], torch.zeros_like(bias[0])]).repeat(1, 9)
    z = conv(x, taps, factors, slope=1.0, tf32=tf32, out_dtype=torch.float32)
    if c2:
        t = conv(
            skip, marked_as_rounded(weight[:, c1:], of=weight), bias, slope=1.0, tf32=tf32, out_dtype=torch.float32
        )
    else:  # no skip comes in
        added = bias_or_zeros(bias, o, y)
        added = added[1] if scaled(bias) else added
        t = empty_channels_last(y, o, height, width, torch.float32).copy_(added[:, None, None])
    config, pixels = gather_config(o), n * height * width
    launch(
        _gather_taps_kernel, (triton.cdiv(pixels, config.block_p) * triton.cdiv(o, config.block_c),),
        z, t, y, pixels, o, h, w, height, width, (height - 2 * h) // 2, (width - 2 * w) // 2,
        MODE=mode, ALIGN_CORNERS=align_corners, SLOPE=slope, **config.options(),
    )  # fmt: skip
    return y
