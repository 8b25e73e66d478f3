"""Gradients of the operators: which step runs on what, and what is saved for it.

Backward of a convolution is three steps: through pool and activation to the gradient of the sums,
which gives the bias gradient too; from there to the input (``dgrad``); and to the weight
(``wgrad``). :mod:`fastunet.dispatch` answers for the last two apart, layer by layer, once, in the forward pass:
autograd runs backward in threads of its own, to which a choice forced on a block is unknown.

Saved are an operator's input and output, which are its neighbours' output and input: each map once.
The upsampled map is made again, for one layer's weight gradient at a time; read once for all nine
taps, it costs less than interpolating on the way into each of them. A concatenated map, or the
gradient of one, is never made: each source has its own slice of the weight.

First-order, and the same to the bit each time: no sum depends on which program ends first.

By a plan (:mod:`fastunet.ops.operator`) a formula sees of ``ctx`` its saved tensors, which gradients are needed, and
the attributes that were set in the forward pass: numbers, words and tuples, which with the tensors' kinds decide what
it does. It sets none.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .common import channels_last, empty
from .launchers import Shapes, chosen
from .steps import (
    Gradient,
    activation_backward,
    conv_dgrad,
    conv_transpose_dgrad,
    conv_transpose_wgrad,
    conv_wgrad,
    convolution_backward,
    norm_backward,
    norm_backward_torch,
    upsample_concat_wgrad,
)
from .upsampling import fitted, launched, upsample_backward

aten = torch.ops.aten


# --- first order only ------------------------------------------------------------------------


class _Refusal(torch.autograd.Function):
    """Passes ``count`` gradients on; whoever differentiates them by what they depend on is told that it cannot be done.

    Were they cut off from that, a penalty on gradients would be left out of a loss without a word.
    """

    @staticmethod
    def forward(name: str, count: int, *gradients_and_sources: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients_and_sources[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            f"fastunet.ops.{ctx.name}: gradients of gradients are not supported; "
            "fastunet.reference.UNet has the same parameters and supports them"
        )


def _first_order(formula: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """The formula without a graph of its own, whose results cannot be differentiated again."""

    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            found = formula(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        tensors = [g for g in found if g is not None]
        sources = [t for t in (*gradients, *ctx.saved_tensors) if t is not None]
        name = getattr(ctx, "operator", formula.__name__)
        passed = iter(_Refusal.apply(name, len(tensors), *tensors, *sources))  # pyright: ignore
        return tuple(None if g is None else next(passed) for g in found)

    return backward


# --- which step runs on what -------------------------------------------------------------------------------


def _choose(ctx: Any, op: str, maps: Shapes, weight: Tensor, mode: str = "none", geometry: str = "") -> None:
    """Which steps are kernels of ours: of this layer, and where no layer is measured, the passes between them."""
    layer = op, maps, tuple(weight.shape), weight.device, weight.dtype, mode
    ctx.dgrad, wgrad = (chosen(*layer, step, geometry).implementation for step in ("dgrad", "wgrad"))
    ctx.wgrad = wgrad == "triton"
    ctx.gather, also = (_ours(weight, step) for step in ("dgrad", "wgrad"))
    ctx.kernels = ctx.gather or also


def _ours(x: Tensor, step: str) -> bool:
    return dispatch.choose(x.device, x.dtype, step).implementation == "triton"


def _activation_backward(
    ctx: Any, grad: Tensor, grad_pooled: Tensor | None, y: Tensor | None, bias: bool
) -> tuple[Tensor, Gradient]:
    """Gradient of the sums and, from our kernel, of the bias; without an activation that comes with the weight's."""
    if ctx.kernels and y is not None:
        g, grad_bias = activation_backward(grad, grad_pooled, y, ctx.slope, bias)
        return g, grad_bias if bias else None
    if y is None:
        return grad, None
    if grad_pooled is not None:
        grad = grad + _through_max_pool(grad_pooled, y)
    if ctx.slope == 0:
        grad = aten.threshold_backward(grad, y, 0)
    elif ctx.slope != 1:
        grad = aten.leaky_relu_backward(grad, y, ctx.slope, True)
    return grad, None


def _through_max_pool(grad_pooled: Tensor, y: Tensor) -> Tensor:
    """Gradient of y from that of its 2x2 max-pool, by PyTorch: the places of the maxima are found again."""
    _, places = aten.max_pool2d_with_indices(y, [2, 2], [2, 2])
    return aten.max_pool2d_with_indices_backward(grad_pooled, y, [2, 2], [2, 2], [0, 0], [1, 1], False, places)


def _dgrad(ctx: Any, g: Tensor, weight: Tensor, height: int, width: int) -> Gradient:
    """Gradient of an input of ``height`` x ``width``."""
    if ctx.dgrad != "torch":
        return conv_dgrad(g, weight, ctx.stride, ctx.padding, height, width, ctx.dgrad == "hopper")
    # PyTorch asks for the input, and reads its shape and layout.
    x = empty(g, weight.shape[1], height, width)
    return convolution_backward(g, x, weight, (True, False, False), ctx.stride, ctx.padding)[0]


def _wgrad_torch(
    ctx: Any, g: Tensor, sources: Sequence[Tensor], weight: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Gradient, Gradient]:
    """PyTorch's gradients of the weight of concatenated sources, and of the bias."""
    parts = weight.split([x.shape[1] for x in sources], 1)
    found = []
    for i, (x, part) in enumerate(zip(sources, parts, strict=True)):
        wanted = False, need_weight, need_bias and i == 0
        found.append(convolution_backward(g, x, part, wanted, ctx.stride, ctx.padding))
        if not need_weight:
            break
    if len(found) == 1:
        return found[0][1:]
    return torch.cat([grad for _, grad, _ in found], 1), found[0][2]


def _through_upsampling(ctx: Any, grad: Tensor, x: Tensor, match: str = "zero_pad") -> Tensor:
    """Gradient of x from that of its upsampled, padded form."""
    if ctx.mode == "none" and grad.shape[2:] == x.shape[2:]:
        return grad
    return upsample_backward(grad, x.shape[2], x.shape[3], ctx.mode, ctx.align_corners, match, ctx.gather)


# --- conv2d_relu -----------------------------------------------------------------------------


def save_conv(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, ctx.slope, stride, ctx.padding = inputs
    ctx.stride = tuple(stride)
    y = output[0] if isinstance(output, tuple) else output
    linear = ctx.slope == 1 and not isinstance(output, tuple)
    ctx.save_for_backward(x, weight, None if linear else y)
    op, ctx.operator = "conv2d_relu_pool" if isinstance(output, tuple) else "conv2d_relu", "conv2d_relu"
    _choose(ctx, op, (tuple(x.shape),), weight, geometry=dispatch.geometry(ctx.stride, ctx.padding))


def _conv_gradients(ctx: Any, grad: Tensor, grad_pooled: Tensor | None) -> tuple[Any, ...]:
    x, weight, y = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    g, grad_bias = _activation_backward(ctx, grad, grad_pooled, y, need_bias)
    geometry = ctx.stride, ctx.padding
    if not ctx.kernels:  # in one call, which lays g out once
        return *convolution_backward(g, x, weight, (need_x, need_weight, need_bias), *geometry), None, None, None
    need_bias &= grad_bias is None
    grad_weight = None
    if need_weight and ctx.wgrad:
        grad_weight, with_it = conv_wgrad(g, x, weight, *geometry, need_bias)
        grad_bias = with_it if need_bias else grad_bias
    elif need_weight or need_bias:
        grad_weight, grad_bias_torch = _wgrad_torch(ctx, g, [x], weight, need_weight, need_bias)
        grad_bias = grad_bias_torch if grad_bias is None else grad_bias
    grad_x = _dgrad(ctx, g, weight, *x.shape[2:]) if need_x else None
    return grad_x, grad_weight, grad_bias, None, None, None


@_first_order
def conv2d_relu(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _conv_gradients(ctx, grad, None)


@_first_order
def conv2d_relu_pool(ctx: Any, grad: Tensor, grad_pooled: Tensor) -> tuple[Any, ...]:
    return _conv_gradients(ctx, grad, grad_pooled)


# --- norm_relu -------------------------------------------------------------------------------


def save_norm(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, mean, variance, ctx.eps, ctx.slope, ctx.pool, ctx.per_image, rstd = inputs
    y, _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.fixed, ctx.operator = mean is not None, "instance_norm_relu" if ctx.per_image else "batch_norm_relu"
    if rstd is not None:  # x's own, taken before
        ctx.fixed, variance = False, None
    elif not ctx.fixed:
        mean, rstd, variance = statistics[0], statistics[1], None
    else:
        rstd = statistics[1]
    # Of fixed statistics x is wanted for the gradient of the factors alone; y is kept by who reads it anyway.
    wanted = not ctx.fixed or ctx.needs_input_grad[1]
    ctx.save_for_backward(x if wanted else None, y, weight, mean, variance, rstd)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias))
    ctx.kernels = _ours(x, "dgrad")


@_first_order
def norm_relu(ctx: Any, grad: Tensor, grad_pooled: Tensor, *_: Any) -> tuple[Any, ...]:
    x, y, weight, mean, variance, rstd = ctx.saved_tensors
    x = y if x is None else x  # for sums that nobody reads
    pooled = grad_pooled if ctx.pool else None
    if ctx.kernels:
        grad_x, sums = norm_backward(grad, pooled, x, y, weight, mean, rstd, ctx.slope, ctx.fixed)
    else:
        g = _activation_backward(ctx, grad, pooled, y, False)[0]
        fixed = (mean, variance) if ctx.fixed else (None, None)
        grad_x, sums = norm_backward_torch(g, x, weight, *fixed, ctx.eps, ctx.per_image)
    of_bias, of_weight = sums
    grads = [None if dtype is None else s.to(dtype) for s, dtype in zip((of_weight, of_bias), ctx.dtypes, strict=True)]
    return grad_x, *grads, *[None] * 7


# --- upsample_concat -------------------------------------------------------------------------


def save_upsample(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, ctx.mode, ctx.align_corners = inputs
    ctx.save_for_backward(x)  # for its shape alone; it is kept by whoever made it anyway
    ctx.gather = _ours(x, "dgrad")


@_first_order
def upsample_concat(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    need_x, need_skip = ctx.needs_input_grad[:2]
    grad_x = _through_upsampling(ctx, grad[:, : x.shape[1]], x) if need_x else None
    grad_skip = grad[:, x.shape[1] :].contiguous(memory_format=torch.channels_last) if need_skip else None
    return grad_x, grad_skip, None, None


# --- upsample_concat_conv2d_relu -------------------------------------------------------------


def save_upsample_conv(ctx: Any, inputs: Any, output: Any) -> None:
    x, skip, weight, _, ctx.mode, ctx.align_corners, ctx.slope, ctx.match, ctx.padding = inputs
    ctx.stride = (1, 1)
    ctx.save_for_backward(x, skip, weight, None if ctx.slope == 1 else output)
    maps, mode = launched(x, skip, ctx.mode, ctx.match)
    _choose(ctx, "upsample_concat_conv2d_relu", maps, weight, mode, dispatch.geometry(ctx.stride, ctx.padding))


@_first_order
def upsample_concat_conv2d_relu(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, skip, weight, y = ctx.saved_tensors
    need_x, need_skip, need_weight, need_bias = ctx.needs_input_grad[:4]
    g, grad_bias = _activation_backward(ctx, grad, None, y, need_bias)
    c1, c2 = x.shape[1], skip.shape[1]
    how, geometry = (ctx.mode, ctx.align_corners, ctx.match), (ctx.stride, ctx.padding)
    rest = [None] * 5
    grad_weight = grad_x = grad_skip = None
    if not ctx.kernels:
        given = g, fitted(x, skip, *how), weight[:, :c1], (need_x, need_weight, need_bias)
        grad_upsampled, grad_weight, grad_bias = convolution_backward(*given, *geometry)
        if c2:
            given = g, channels_last(skip), weight[:, c1:], (need_skip, need_weight, False)
            grad_skip, second, _ = convolution_backward(*given, *geometry)
            if grad_weight is not None and second is not None:
                grad_weight = torch.cat([grad_weight, second], 1)
        if grad_upsampled is not None:
            grad_x = _through_upsampling(ctx, grad_upsampled, x, ctx.match)
        return grad_x, grad_skip, grad_weight, grad_bias, *rest
    need_bias &= grad_bias is None
    # The weight's first, so that the upsampled map is gone before the gradient of it comes.
    if need_weight and ctx.wgrad:
        grad_weight, with_it = upsample_concat_wgrad(g, x, skip, weight, *how, ctx.padding, need_bias)
        grad_bias = with_it if need_bias else grad_bias
    elif need_weight or need_bias:
        sources = [fitted(x, skip, *how), skip] if c2 else [fitted(x, skip, *how)]
        grad_weight, grad_bias_torch = _wgrad_torch(ctx, g, sources, weight, need_weight, need_bias)
        grad_bias = grad_bias_torch if grad_bias is None else grad_bias
        del sources
    if need_x:
        grad_upsampled = _dgrad(ctx, g, weight[:, :c1], *skip.shape[2:])
        assert grad_upsampled is not None
        grad_x = _through_upsampling(ctx, grad_upsampled, x, ctx.match)
    if need_skip and c2:
        grad_skip = _dgrad(ctx, g, weight[:, c1:], *skip.shape[2:])
    return grad_x, grad_skip, grad_weight, grad_bias, *rest


# --- conv_transpose2x2 -----------------------------------------------------------------------


def save_transpose(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)
    _choose(ctx, "conv_transpose2x2", (tuple(x.shape),), weight)


@_first_order
def conv_transpose2x2(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    found: list[Gradient] = [None, None, None]
    if ctx.dgrad != "torch" and need_x:
        found[0], need_x = conv_transpose_dgrad(grad, weight), False
    if ctx.wgrad and need_weight:
        found[1], with_it = conv_transpose_wgrad(grad, x, weight, need_bias)
        found[2] = with_it if need_bias else None
        need_weight = need_bias = False
    if need_x or need_weight or need_bias:
        wanted, stride = (need_x, need_weight, need_bias), weight.shape[2:]
        rest = convolution_backward(grad, x, weight, wanted, stride, transposed=True)
        found = [ours if theirs is None else theirs for ours, theirs in zip(found, rest, strict=True)]
    return tuple(found)
