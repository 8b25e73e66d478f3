"""The operators themselves: the kernel or the plain reference, a fake, and where the gradients come from.

Each operator has its body twice: registered with torch.library, and ``<name>_torch`` for a CPU that
wants no gradients.
"""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, reference
from . import backward, commuted
from .common import channels_last, empty, on_device, repeatable_cudnn, result, takes_triton, tf32, zeros
from .launchers import launcher
from .operator import Operator
from .upsampling import fitted, is_replicated

if TYPE_CHECKING or dispatch.has_triton():
    from .. import kernels


# --- conv2d_relu -----------------------------------------------------------------------------


def conv2d_relu_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, slope: float, stride: Sequence[int], padding: str
) -> Tensor:
    # channels_last is the faster layout of torch's CPU convolutions as well.
    return result(reference.conv2d_relu(channels_last(x), weight, bias, slope, stride, padding))


@Operator
def conv2d_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, slope: float, stride: Sequence[int], padding: str
) -> Tensor:
    launch = launcher("conv_fwd", "conv2d_relu", (x,), weight, bias, stride=stride, padding=padding)
    if launch is not None:
        with on_device(x):
            return launch(x, weight, bias, slope=slope, tf32=tf32())
    return conv2d_relu_torch(x, weight, bias, slope, stride, padding)


@conv2d_relu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, slope: float, stride: Sequence[int], padding: str) -> Tensor:
    return empty(x, weight.shape[0], *_convolved(x, weight, stride, padding))


def conv2d_relu_pool_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, slope: float, stride: Sequence[int], padding: str
) -> tuple[Tensor, Tensor]:
    y = conv2d_relu_torch(x, weight, bias, slope, stride, padding)
    return y, max_pool2x2(y)


@Operator
def conv2d_relu_pool(
    x: Tensor, weight: Tensor, bias: Tensor | None, slope: float, stride: Sequence[int], padding: str
) -> tuple[Tensor, Tensor]:
    launch = launcher("conv_pool_fwd", "conv2d_relu_pool", (x,), weight, bias, stride=stride, padding=padding)
    if launch is not None:
        with on_device(x):
            return launch(x, weight, bias, slope=slope, tf32=tf32())
    return conv2d_relu_pool_torch(x, weight, bias, slope, stride, padding)


@conv2d_relu_pool.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, slope: float, stride: Sequence[int], padding: str
) -> tuple[Tensor, Tensor]:
    o, (h, w) = weight.shape[0], _convolved(x, weight, stride, padding)
    return empty(x, o, h, w), empty(x, o, h // 2, w // 2)


def max_pool2x2(x: Tensor) -> Tensor:
    """(N, C, H // 2, W // 2), channels_last."""
    return result(F.max_pool2d(x, 2))


def _convolved(x: Tensor, weight: Tensor, stride: Sequence[int], padding: str) -> tuple[int, int]:
    """(H, W) of a convolution's result."""
    lost = weight.shape[-1] - 1 - 2 * zeros(weight, padding)
    return (x.shape[2] - lost - 1) // stride[0] + 1, (x.shape[3] - lost - 1) // stride[1] + 1


# --- conv2d_relu_head: with nothing written between ------------------------------------------


def conv2d_relu_head_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, head: Tensor, head_bias: Tensor | None, slope: float
) -> Tensor:
    y = conv2d_relu_torch(x, weight, bias, slope, (1, 1), "same")
    return conv2d_relu_torch(y, head, head_bias, 1.0, (1, 1), "same")


@Operator
def conv2d_relu_head(
    x: Tensor, weight: Tensor, bias: Tensor | None, head: Tensor, head_bias: Tensor | None, slope: float
) -> Tensor:
    """Without gradients: theirs would want the map between."""
    launch = launcher("conv_head_fwd", "conv2d_relu_head", (x,), weight, bias, classes=len(head))
    if launch is not None:
        with on_device(x):
            return launch(x, weight, bias, head, head_bias, slope=slope, tf32=tf32())
    if not takes_triton(x):
        return conv2d_relu_head_torch(x, weight, bias, head, head_bias, slope)
    y = conv2d_relu(x, weight, bias, slope, (1, 1), "same")  # each as a table has it
    return conv2d_relu(y, head, head_bias, 1.0, (1, 1), "same")


@conv2d_relu_head.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, head: Tensor, head_bias: Tensor | None, slope: float) -> Tensor:
    return empty(x, len(head), *x.shape[2:])


# --- norm_relu: batch norm, and per image instance norm ----------------------------------------

Normed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # y, its max-pool, mean, rstd, unbiased variance


def norm_relu_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    slope: float,
    pool: bool,
    per_image: bool,
) -> tuple[Tensor, Tensor]:
    """y and its max-pool, of no elements if there is none."""
    # A CPU sums channels_last maps pixel by pixel, with up to 300 times the error.
    maps = x if x.is_cuda or mean is not None else x.contiguous()
    given = [weight, bias, mean, variance]
    wide = torch.promote_types(x.dtype, torch.float32)
    if any(t is not None and t.dtype != x.dtype for t in given):  # all the same, or all of them wide
        given = [t if t is None else t.to(wide) for t in given]
    if not x.numel():
        y = torch.empty_like(maps)
    elif per_image:
        y = reference.instance_norm_relu(maps, given[0], given[1], eps, slope)
    else:
        y = reference.batch_norm_relu(maps, given[0], given[1], eps, slope, given[2], given[3])
    y = result(y)
    return y, max_pool2x2(y) if pool else y.new_empty(0)


def statistics_torch(x: Tensor, eps: float, per_image: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, rstd and unbiased variance of each channel, of the batch or of each image; NaN of nothing."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.numel():
        maps = x if x.is_cuda else x.contiguous()
        biased, mean = torch.var_mean(maps.to(wide), (2, 3) if per_image else (0, 2, 3), correction=0)
    else:
        biased = mean = x.new_full(x.shape[:2] if per_image else x.shape[1:2], torch.nan, dtype=wide)
    count = x.numel() // max(1, mean.numel())
    return mean, torch.rsqrt(biased + eps), biased * (count / max(1, count - 1))


@Operator
def norm_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    slope: float,
    pool: bool,
    per_image: bool,
    rstd: Tensor | None,
) -> Normed:
    """With ``rstd`` mean, it and the variance are x's own, taken before, and not given again."""
    if mean is not None and variance is not None and rstd is not None:
        return _norm_relu_of_taken(x, weight, bias, (mean, rstd, variance), eps, slope, pool, per_image)
    fixed = None if mean is None or variance is None else (mean, variance)
    if not takes_triton(x):
        y, pooled = norm_relu_torch(x, weight, bias, mean, variance, eps, slope, pool, per_image)
        if fixed is None:
            return y, pooled, *statistics_torch(x, eps, per_image)
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, variance = (t.to(wide, copy=True) for t in fixed)
        return y, pooled, mean, torch.rsqrt(variance + eps), variance
    with on_device(x):
        y, pooled, *statistics = kernels.norm_fwd(
            x, weight, bias, fixed, eps=eps, slope=slope, pool=pool, per_image=per_image
        )
    # No operator returns what it was given.
    own = [t.clone() if t is mean or t is variance else t for t in statistics]
    return y, y.new_empty(0) if pooled is None else pooled, own[0], own[1], own[2]


def _norm_relu_of_taken(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    taken: tuple[Tensor, Tensor, Tensor],
    eps: float,
    slope: float,
    pool: bool,
    per_image: bool,
) -> Normed:
    nothing = (x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(3))
    if not takes_triton(x):
        return *norm_relu_torch(x, weight, bias, None, None, eps, slope, pool, per_image), *nothing  # pyright: ignore
    with on_device(x):
        options = {"eps": eps, "slope": slope, "pool": pool, "per_image": per_image}
        y, pooled, *_ = kernels.norm_fwd(x, weight, bias, taken=taken, **options)
    return y, y.new_empty(0) if pooled is None else pooled, *nothing  # pyright: ignore[reportReturnType]


@norm_relu.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    slope: float,
    pool: bool,
    per_image: bool,
    rstd: Tensor | None,
) -> Normed:
    n, c, h, w = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = (0,) if rstd is not None else (n, c) if per_image else (c,)
    of_what = (x.new_empty(shape, dtype=wide) for _ in range(3))
    return empty(x, c, h, w), empty(x, c, h // 2, w // 2) if pool else x.new_empty(0), *of_what  # pyright: ignore


# --- upsample_concat -------------------------------------------------------------------------


def upsample_concat_torch(x: Tensor, skip: Tensor, mode: str, align_corners: bool) -> Tensor:
    return result(reference.upsample_concat(x, skip, mode, align_corners))


@Operator
def upsample_concat(x: Tensor, skip: Tensor, mode: str, align_corners: bool) -> Tensor:
    if takes_triton(x):
        with on_device(x):
            return kernels.upsample_concat_fwd(x, skip, mode=mode, align_corners=align_corners)
    return upsample_concat_torch(x, skip, mode, align_corners)


@upsample_concat.register_fake
def _(x: Tensor, skip: Tensor, mode: str, align_corners: bool) -> Tensor:
    return empty(skip, x.shape[1] + skip.shape[1], skip.shape[2], skip.shape[3])


# --- upsample_concat_conv2d_relu -------------------------------------------------------------


def upsample_concat_conv2d_relu_torch(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mode: str,
    align_corners: bool,
    slope: float,
    match: str,
    padding: str,
) -> Tensor:
    if is_replicated(x, skip, mode, match):
        x, mode = fitted(x, skip, mode, align_corners, match), "none"
    x, skip = channels_last(x), channels_last(skip)
    given = x, skip, weight, bias, mode, align_corners, slope
    if padding == "same" and commuted.pays(x, skip, mode) and (bias is None or bias.dim() == 1):
        return result(commuted.upsample_concat_conv2d_relu(*given))
    return result(reference.upsample_concat_conv2d_relu(*given, padding))


@Operator
def upsample_concat_conv2d_relu(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mode: str,
    align_corners: bool,
    slope: float,
    match: str,
    padding: str,
) -> Tensor:
    if is_replicated(x, skip, mode, match):
        x, mode = fitted(x, skip, mode, align_corners, match), "none"
    of = "upsample_concat_conv2d_relu", (x, skip), weight, bias, mode
    launch = launcher("upconcat_conv3x3_fwd", *of, padding=padding)
    if launch is not None:
        with on_device(x):
            return launch(x, skip, weight, bias, mode=mode, align_corners=align_corners, slope=slope, tf32=tf32())
    return upsample_concat_conv2d_relu_torch(x, skip, weight, bias, mode, align_corners, slope, match, padding)


@upsample_concat_conv2d_relu.register_fake
def _(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mode: str,
    align_corners: bool,
    slope: float,
    match: str,
    padding: str,
) -> Tensor:
    return empty(skip, weight.shape[0], *_convolved(skip, weight, (1, 1), padding))


# --- conv_transpose2x2 -----------------------------------------------------------------------


def conv_transpose2x2_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # cuDNN computes it as a gradient, whose fastest ways do not repeat.
    with repeatable_cudnn() if x.is_cuda else contextlib.nullcontext():
        return result(reference.conv_transpose2x2(channels_last(x), weight, bias))


@Operator
def conv_transpose2x2(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    launch = launcher("conv_transpose_fwd", "conv_transpose2x2", (x,), weight, bias)
    if launch is not None:
        with on_device(x):
            return launch(x, weight, bias, tf32=tf32())
    return conv_transpose2x2_torch(x, weight, bias)


@conv_transpose2x2.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return empty(x, weight.shape[1], weight.shape[2] * x.shape[2], weight.shape[3] * x.shape[3])


# --- gradients -------------------------------------------------------------------------------

conv2d_relu.register_autograd(backward.conv2d_relu, setup_context=backward.save_conv)
conv2d_relu_pool.register_autograd(backward.conv2d_relu_pool, setup_context=backward.save_conv)
norm_relu.register_autograd(backward.norm_relu, setup_context=backward.save_norm)
upsample_concat.register_autograd(backward.upsample_concat, setup_context=backward.save_upsample)
upsample_concat_conv2d_relu.register_autograd(
    backward.upsample_concat_conv2d_relu, setup_context=backward.save_upsample_conv
)
conv_transpose2x2.register_autograd(backward.conv_transpose2x2, setup_context=backward.save_transpose)
