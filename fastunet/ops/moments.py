"""Convolutions before a norm, which give the norm's statistics with their result: in one pass where that is Hopper's.

Mean, 1 / sqrt(variance + eps) and unbiased variance of each channel, (O,), or of each image, (N, O). Without gradients:
the norm's own formula takes in that they depend on the map.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backward, forward
from .common import on_device, tf32
from .launchers import launcher
from .operator import Operator
from .upsampling import fitted, is_replicated

Moments = tuple[Tensor, Tensor, Tensor, Tensor]  # y, mean, rstd, unbiased variance


@Operator
def conv2d_moments(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: str, eps: float, per_image: bool
) -> Moments:
    launch = launcher("conv_moments_fwd", "conv2d_relu", (x,), weight, bias, stride=stride, padding=padding)
    if launch is not None:
        with on_device(x):
            return launch(x, weight, bias, eps=eps, per_image=per_image, tf32=tf32())
    y = forward.conv2d_relu_torch(x, weight, bias, 1.0, stride, padding)
    return y, *forward.statistics_torch(y, eps, per_image)


@conv2d_moments.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: str, eps: float, per_image: bool
) -> Moments:
    return _fake(forward.conv2d_relu(x, weight, bias, 1.0, stride, padding), per_image)


@Operator
def upsample_concat_conv2d_moments(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mode: str,
    align_corners: bool,
    match: str,
    padding: str,
    eps: float,
    per_image: bool,
) -> Moments:
    given = x, skip, weight, bias, mode, align_corners, 1.0, match, padding
    if is_replicated(x, skip, mode, match):
        x, mode = fitted(x, skip, mode, align_corners, match), "none"
    of = "upsample_concat_conv2d_relu", (x, skip), weight, bias, mode
    launch = launcher("upconcat_conv3x3_moments_fwd", *of, padding=padding)
    if launch is not None:
        with on_device(x):
            how: Any = {"mode": mode, "align_corners": align_corners, "eps": eps, "per_image": per_image}
            return launch(x, skip, weight, bias, **how, tf32=tf32())
    y = forward.upsample_concat_conv2d_relu_torch(*given)
    return y, *forward.statistics_torch(y, eps, per_image)


@upsample_concat_conv2d_moments.register_fake
def _(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mode: str,
    align_corners: bool,
    match: str,
    padding: str,
    eps: float,
    per_image: bool,
) -> Moments:
    given = x, skip, weight, bias, mode, align_corners, 1.0, match, padding
    return _fake(forward.upsample_concat_conv2d_relu(*given), per_image)


def _fake(y: Tensor, per_image: bool) -> Moments:
    wide = torch.promote_types(y.dtype, torch.float32)
    mean, rstd, variance = (y.new_empty(y.shape[:2] if per_image else y.shape[1:2], dtype=wide) for _ in range(3))
    return y, mean, rstd, variance


# --- gradients: those of the convolution -----------------------------------------------------


def _save_conv(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, stride, padding, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    backward.save_conv(ctx, (x, weight, bias, 1.0, stride, padding), output[0])


def _conv(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return *backward.conv2d_relu(ctx, grad)[:3], *[None] * 4


def _save_upsample_conv(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, mode, align_corners, match, padding, _, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    backward.save_upsample_conv(ctx, (*tensors, mode, align_corners, 1.0, match, padding), output[0])


def _upsample_conv(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return *backward.upsample_concat_conv2d_relu(ctx, grad)[:4], *[None] * 6


conv2d_moments.register_autograd(_conv, setup_context=_save_conv)
upsample_concat_conv2d_moments.register_autograd(_upsample_conv, setup_context=_save_upsample_conv)
