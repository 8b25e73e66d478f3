"""The steps of a backward pass, each an operator of its own: traced as one, and the same to the bit each time.

Of several results that need not be wanted, those that are not are of no elements: operators give tensors alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import dispatch
from .common import channels_last, empty, on_device, repeatable_cudnn, result, tf32, zeros
from .operator import Operator
from .upsampling import fitted, is_replicated

if TYPE_CHECKING or dispatch.has_triton():
    from .. import kernels

aten = torch.ops.aten
Gradient = Tensor | None


@Operator
def activation_backward(
    grad: Tensor, grad_pooled: Tensor | None, y: Tensor, slope: float, bias: bool
) -> tuple[Tensor, Tensor]:
    with on_device(grad):
        g, grad_bias = kernels.activation_bwd(grad, grad_pooled, y, slope=slope, bias=bias)
    return g, grad.new_empty(0) if grad_bias is None else grad_bias


@activation_backward.register_fake
def _(grad: Tensor, grad_pooled: Tensor | None, y: Tensor, slope: float, bias: bool) -> tuple[Tensor, Tensor]:
    return empty(y, *y.shape[1:]), grad.new_empty(y.shape[1] if bias else 0)


@Operator
def norm_backward(
    grad: Tensor,
    grad_pooled: Tensor | None,
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    slope: float,
    fixed: bool,
) -> tuple[Tensor, Tensor]:
    with on_device(grad):
        return kernels.norm_bwd(grad, grad_pooled, x, y, weight, mean, rstd, slope=slope, fixed=fixed)


@norm_backward.register_fake
def _(
    grad: Tensor,
    grad_pooled: Tensor | None,
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    slope: float,
    fixed: bool,
) -> tuple[Tensor, Tensor]:
    return empty(x, *x.shape[1:]), mean.new_empty(2, mean.shape[-1])


@Operator
def norm_backward_torch(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    per_image: bool,
) -> tuple[Tensor, Tensor]:
    """PyTorch's, in NCHW on a CPU: the gradient of x, and those of bias and weight, (2, C)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if not x.numel():
        return empty(x, *x.shape[1:]), x.new_zeros((2, x.shape[1]), dtype=wide)
    maps, g = (x, g) if x.is_cuda and not per_image else (x.contiguous(), g.contiguous())
    gamma = torch.ones_like(x[0, :, 0, 0], dtype=wide) if weight is None else weight.to(wide)
    n, c, h, w = x.shape
    if per_image:  # the batch norm of one image that has the channels of all
        maps, g, gamma = maps.view(1, n * c, h, w), g.view(1, n * c, h, w), gamma.repeat(n)
    if mean is not None and variance is not None:
        statistics = mean.to(wide), variance.to(wide), None, None, False
    else:
        saved = aten.native_batch_norm(maps, gamma, torch.zeros_like(gamma), None, None, True, 0.0, eps)[1:]
        statistics = None, None, *saved, True
    grad_x, *sums = aten.native_batch_norm_backward(g, maps, gamma, *statistics, eps, [True, True, True])
    return result(grad_x.view(x.shape)), torch.stack(sums[::-1]).view(2, -1, c).sum(1)


@norm_backward_torch.register_fake
def _(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    per_image: bool,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return empty(x, *x.shape[1:]), x.new_empty((2, x.shape[1]), dtype=wide)


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: tuple[bool, bool, bool],
    stride: Sequence[int] = (1, 1),
    padding: str = "same",
    *,
    transposed: bool = False,
) -> tuple[Gradient, Gradient, Gradient]:
    """PyTorch's gradients of input, weight and bias, those that ``mask`` asks for."""
    geometry = list(stride), 0 if transposed else zeros(weight, padding), transposed
    if not grad.is_cuda:
        return _convolution_backward(grad, x, weight, list(mask), *geometry)
    found = cudnn_backward(grad, x, weight, list(mask), *geometry)
    x_grad, weight_grad, bias_grad = (g if wanted else None for g, wanted in zip(found, mask, strict=True))
    return x_grad, weight_grad, bias_grad


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool], stride: list[int], pad: int, transposed: bool
) -> tuple[Gradient, Gradient, Gradient]:
    options = stride, [pad, pad], [1, 1], transposed, [0, 0], 1
    return aten.convolution_backward(grad, x, weight, [grad.shape[1]], *options, mask)


# Compiled code, which takes no operator of ours apart, would lose what is set around the call.
@Operator
def cudnn_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool], stride: list[int], pad: int, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with repeatable_cudnn():
        found = _convolution_backward(grad, x, weight, mask, stride, pad, transposed)
    grad_x, grad_weight, grad_bias = (grad.new_empty(0) if g is None else g for g in found)
    if mask[0]:
        grad_x = channels_last(grad_x)
    return grad_x, channels_last(grad_weight) if mask[1] else grad_weight, grad_bias


@cudnn_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool], stride: list[int], pad: int, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = (t if asked else t.new_empty(0) for t, asked in zip((x, weight), mask[:2], strict=True))
    grad_x, grad_weight = (empty(t, *t.shape[1:]) if t.dim() == 4 else t for t in wanted)
    return grad_x, grad_weight, grad.new_empty(grad.shape[1] if mask[2] else 0)


@Operator
def conv_dgrad(
    g: Tensor, weight: Tensor, stride: Sequence[int], padding: str, height: int, width: int, hopper: bool
) -> Tensor:
    """Gradient of an input of ``height`` x ``width``."""
    with on_device(g):
        if hopper:
            return kernels.hopper.conv_dgrad(g, weight, tf32=tf32())
        how: Any = {"stride": tuple(stride), "pad": zeros(weight, padding), "size": (height, width)}
        return kernels.conv_dgrad(g, weight, tf32=tf32(), **how)


@conv_dgrad.register_fake
def _(g: Tensor, weight: Tensor, stride: Sequence[int], padding: str, height: int, width: int, hopper: bool) -> Tensor:
    return empty(g, weight.shape[1], height, width)


@Operator
def conv_wgrad(
    g: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: str, bias: bool
) -> tuple[Tensor, Tensor]:
    """Of ``weight`` the shape alone counts."""
    with on_device(g):
        how: Any = {"stride": tuple(stride), "pad": zeros(weight, padding)}
        return _both(*kernels.conv_wgrad(g, [x], weight.shape[-1], bias=bias, tf32=tf32(), **how))


@conv_wgrad.register_fake
def _(g: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: str, bias: bool) -> tuple[Tensor, Tensor]:
    return empty(weight, *weight.shape[1:]), g.new_empty(g.shape[1] if bias else 0)


@Operator
def upsample_concat_wgrad(
    g: Tensor,
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    mode: str,
    align_corners: bool,
    match: str,
    padding: str,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    """Of ``weight`` the shape alone counts."""
    with on_device(g):
        if is_replicated(x, skip, mode, match):
            x = fitted(x, skip, mode, align_corners, match)
        elif mode != "none":
            x = kernels.upsample_fwd(x, *skip.shape[2:], mode=mode, align_corners=align_corners)
        sources, size = [x, skip] if skip.shape[1] else [x], (skip.shape[2], skip.shape[3])
        how: Any = {"pad": zeros(weight, padding), "size": size}
        return _both(*kernels.conv_wgrad(g, sources, 3, bias=bias, tf32=tf32(), **how))


@upsample_concat_wgrad.register_fake
def _(
    g: Tensor,
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    mode: str,
    align_corners: bool,
    match: str,
    padding: str,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    return empty(weight, *weight.shape[1:]), g.new_empty(g.shape[1] if bias else 0)


def _both(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """For an operator, which gives tensors alone: of no elements where no bias gradient is wanted."""
    return weight, weight.new_empty(0) if bias is None else bias


@Operator
def conv_transpose_dgrad(grad: Tensor, weight: Tensor) -> Tensor:
    with on_device(grad):
        return kernels.conv_transpose_dgrad(grad, weight, tf32=tf32())


@conv_transpose_dgrad.register_fake
def _(grad: Tensor, weight: Tensor) -> Tensor:
    return empty(grad, weight.shape[0], grad.shape[2] // weight.shape[2], grad.shape[3] // weight.shape[3])


@Operator
def conv_transpose_wgrad(grad: Tensor, x: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Of ``weight`` the shape alone counts."""
    with on_device(grad):
        found, grad_bias = kernels.conv_transpose_wgrad(grad, x, bias=bias, tf32=tf32())
    # Strides of axes of size 1 too as promised, which contiguous() leaves as they are.
    return _both(grad.new_empty(weight.shape).copy_(found), grad_bias)


@conv_transpose_wgrad.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    return grad.new_empty(weight.shape), grad.new_empty(grad.shape[1] if bias else 0)
