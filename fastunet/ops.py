"""The fused operators: the only home of torch.library names.

Each is one custom operator with a fake kernel, so that ``torch.compile`` traces through it, an
autograd formula, and a body that asks :mod:`fastunet.dispatch` whether a Triton kernel or the
plain reference computes it. The functions without underscore are what users call: they check
their arguments, apply the autocast rule, and speak logical NCHW.

Autocast: convolutions run in the autocast dtype, as ``torch.conv2d`` does; ``upsample_concat``
takes the widest dtype of its inputs, as ``torch.cat`` does. float64 is left alone.

On a CPU and without gradients torch's own operators are called at once: the dispatcher's way through
Python to a custom operator and back costs 0.1 ms, which is much to a small network.

Gradients are first-order. What is saved for backward is each operator's input and output; the
upsampled and the concatenated map are computed again.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, measured, reference

if TYPE_CHECKING or dispatch.has_triton():
    from . import kernels

aten = torch.ops.aten
_UPSAMPLING = ("bilinear", "nearest")


def _takes_triton(x: Tensor) -> bool:
    return dispatch.choose(x.device, x.dtype).implementation == "triton"


Shapes = tuple[tuple[int, ...], ...]


def choose(
    op: str, maps: Shapes, weight: tuple[int, ...], device: torch.device, dtype: torch.dtype, mode: str = "none"
) -> dispatch.Choice:
    """Which implementation serves an operator, and why.

    Args:
        op: name of the operator; with a pool, ``"conv2d_relu_pool"``.
        maps: shape (N, C, H, W) of each source. weight: its shape.
        mode: how the first source is upsampled.
    """
    key = measured.layer_key(op, maps, weight, dtype, mode)
    obstacle = lambda: kernels.hopper.why_not_layer(op, maps, weight, dtype, mode=mode, tf32=tf32())
    return dispatch.choose_layer(device, dtype, key, obstacle)


def _launcher(name: str, op: str, maps: tuple[Tensor, ...], weight: Tensor, mode: str = "none") -> Any:
    """The launcher of that name in the module that serves these tensors; None for plain torch."""
    shapes = tuple(tuple(x.shape) for x in maps)
    choice = choose(op, shapes, tuple(weight.shape), maps[-1].device, maps[-1].dtype, mode)
    if choice.implementation == "torch":
        return None
    if choice.implementation == "triton":
        stem = name == "conv_fwd" and shapes[0][1] <= kernels.STEM_CHANNELS and weight.shape[-1] == 3
        return kernels.stem_fwd if stem else getattr(kernels, name)
    config = choice.entry and choice.entry.config
    found = kernels.hopper.HopperConfig(**config) if config else None
    return functools.partial(getattr(kernels.hopper, name), config=found)


_watched: ContextVar[bool] = ContextVar("fastunet_watched", default=False)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Within the block every call goes through its registered operator, for who looks on by a mode."""
    token = _watched.set(True)
    try:
        yield
    finally:
        _watched.reset(token)


def _at_once(x: Tensor) -> bool:
    """Whether torch's operators serve ``x`` without the dispatcher: on a CPU, without gradients, in eager."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling() or _watched.get():
        return False
    return not _takes_triton(x)


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch where the tensor lives: Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def tf32() -> bool:
    """Whether float32 convolutions may round their factors to tf32."""
    # Answers for torch.backends.cudnn.allow_tf32 too, and does not raise when the two APIs are mixed.
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]


def _empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (like.shape[0], channels, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _channels_last(x: Tensor) -> Tensor:
    """``x`` with exactly the strides that :func:`_empty` gives; copied only if its memory differs.

    Fake kernels promise these strides, and torch goes by them: strides of axes of size 1 are
    arbitrary, and a grey image with the wrong one would send its convolution to the slow layout.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        n, c, h, w = x.shape
        return x.as_strided(x.shape, (h * w * c, 1, w * c, c))
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


# --- conv2d_relu -----------------------------------------------------------------------------


def _conv2d_relu_torch(x: Tensor, weight: Tensor, bias: Tensor | None, slope: float) -> Tensor:
    # channels_last is the faster layout of torch's CPU convolutions as well.
    return _channels_last(reference.conv2d_relu(_channels_last(x), weight, bias, slope))


@torch.library.custom_op("fastunet::conv2d_relu", mutates_args=())
def _conv2d_relu(x: Tensor, weight: Tensor, bias: Tensor | None, slope: float) -> Tensor:
    launcher = _launcher("conv_fwd", "conv2d_relu", (x,), weight)
    if launcher is not None:
        with _on_device(x):
            return launcher(x, weight, bias, slope=slope, tf32=tf32())
    return _conv2d_relu_torch(x, weight, bias, slope)


@_conv2d_relu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, slope: float) -> Tensor:
    return _empty(x, weight.shape[0], x.shape[2], x.shape[3])


def _conv2d_relu_pool_torch(x: Tensor, weight: Tensor, bias: Tensor | None, slope: float) -> tuple[Tensor, Tensor]:
    y = _conv2d_relu_torch(x, weight, bias, slope)
    return y, _channels_last(F.max_pool2d(y, 2))


@torch.library.custom_op("fastunet::conv2d_relu_pool", mutates_args=())
def _conv2d_relu_pool(x: Tensor, weight: Tensor, bias: Tensor | None, slope: float) -> tuple[Tensor, Tensor]:
    launcher = _launcher("conv_pool_fwd", "conv2d_relu_pool", (x,), weight)
    if launcher is not None:
        with _on_device(x):
            return launcher(x, weight, bias, slope=slope, tf32=tf32())
    return _conv2d_relu_pool_torch(x, weight, bias, slope)


@_conv2d_relu_pool.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, slope: float) -> tuple[Tensor, Tensor]:
    o, h, w = weight.shape[0], x.shape[2], x.shape[3]
    return _empty(x, o, h, w), _empty(x, o, h // 2, w // 2)


def _save_conv(ctx, inputs, output) -> None:
    x, weight, bias, slope = inputs
    y = output[0] if isinstance(output, tuple) else output
    ctx.slope, ctx.bias_sizes = slope, None if bias is None else [weight.shape[0]]
    ctx.save_for_backward(x, weight, y)


def _activation_backward(grad: Tensor, y: Tensor, slope: float) -> Tensor:
    """Gradient before the activation, from the activation's output ``y``."""
    if slope == 1:
        return grad
    return aten.threshold_backward(grad, y, 0) if slope == 0 else aten.leaky_relu_backward(grad, y, slope, True)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    pad = weight.shape[-1] // 2
    return aten.convolution_backward(grad, x, weight, bias_sizes, [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, mask)


def _conv2d_relu_backward(ctx, grad: Tensor):
    x, weight, y = ctx.saved_tensors
    grad = _activation_backward(grad, y, ctx.slope)
    return *_convolution_backward(grad, x, weight, ctx.bias_sizes, ctx.needs_input_grad[:3]), None


def _conv2d_relu_pool_backward(ctx, grad: Tensor, grad_pooled: Tensor):
    y = ctx.saved_tensors[2]
    _, indices = aten.max_pool2d_with_indices(y, [2, 2], [2, 2])
    grad = grad + aten.max_pool2d_with_indices_backward(grad_pooled, y, [2, 2], [2, 2], [0, 0], [1, 1], False, indices)
    return _conv2d_relu_backward(ctx, grad)


_conv2d_relu.register_autograd(_conv2d_relu_backward, setup_context=_save_conv)
_conv2d_relu_pool.register_autograd(_conv2d_relu_pool_backward, setup_context=_save_conv)


# --- upsample_concat -------------------------------------------------------------------------


def _upsample_concat_torch(x: Tensor, skip: Tensor, mode: str, align_corners: bool) -> Tensor:
    return _channels_last(reference.upsample_concat(x, skip, mode, align_corners))


@torch.library.custom_op("fastunet::upsample_concat", mutates_args=())
def _upsample_concat(x: Tensor, skip: Tensor, mode: str, align_corners: bool) -> Tensor:
    if _takes_triton(x):
        with _on_device(x):
            return kernels.upsample_concat_fwd(x, skip, mode=mode, align_corners=align_corners)
    return _upsample_concat_torch(x, skip, mode, align_corners)


@_upsample_concat.register_fake
def _(x: Tensor, skip: Tensor, mode: str, align_corners: bool) -> Tensor:
    return _empty(skip, x.shape[1] + skip.shape[1], skip.shape[2], skip.shape[3])


# An operator of its own: torch's bilinear backward cannot be traced with symbolic shapes.
@torch.library.custom_op("fastunet::upsample_backward", mutates_args=())
def _upsample_backward(grad: Tensor, height: int, width: int, mode: str, align_corners: bool) -> Tensor:
    """Gradient of a (N, C, height, width) map from that of its upsampled, padded form."""
    n, c = grad.shape[:2]
    scale = 1 if mode == "none" else 2
    pad = reference.padding((scale * height, scale * width), (grad.shape[2], grad.shape[3]))
    grad = F.pad(grad, [-p for p in pad])  # a negative pad crops what the forward padded
    if mode == "bilinear":
        size = [2 * height, 2 * width]
        grad = aten.upsample_bilinear2d_backward(grad, size, [n, c, height, width], align_corners, 2.0, 2.0)
    elif mode == "nearest":
        grad = aten.upsample_nearest2d_backward(grad, [2 * height, 2 * width], [n, c, height, width], 2.0, 2.0)
    return _channels_last(grad.clone() if mode == "none" else grad)


@_upsample_backward.register_fake
def _(grad: Tensor, height: int, width: int, mode: str, align_corners: bool) -> Tensor:
    return _empty(grad, grad.shape[1], height, width)


def _split_gradient(ctx, grad: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and skip, where wanted, from that of their concatenation."""
    grad_x = grad_skip = None
    if ctx.needs_input_grad[0]:
        assert grad is not None
        grad_x = _upsample_backward(grad[:, : x.shape[1]], x.shape[2], x.shape[3], ctx.mode, ctx.align_corners)
    if ctx.needs_input_grad[1]:
        assert grad is not None
        grad_skip = grad[:, x.shape[1] :].contiguous(memory_format=torch.channels_last)
    return grad_x, grad_skip


def _save_upsample(ctx, inputs, output) -> None:
    x, _, ctx.mode, ctx.align_corners = inputs
    ctx.save_for_backward(x)  # for its shape alone; it is kept by whoever made it anyway


def _upsample_concat_backward(ctx, grad: Tensor):
    (x,) = ctx.saved_tensors
    return *_split_gradient(ctx, grad, x), None, None


_upsample_concat.register_autograd(_upsample_concat_backward, setup_context=_save_upsample)


# --- upsample_concat_conv2d_relu -------------------------------------------------------------


def _upsample_concat_conv2d_relu_torch(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, mode: str, align_corners: bool, slope: float
) -> Tensor:
    x, skip = _channels_last(x), _channels_last(skip)
    return _channels_last(reference.upsample_concat_conv2d_relu(x, skip, weight, bias, mode, align_corners, slope))


@torch.library.custom_op("fastunet::upsample_concat_conv2d_relu", mutates_args=())
def _upsample_concat_conv2d_relu(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, mode: str, align_corners: bool, slope: float
) -> Tensor:
    launcher = _launcher("upconcat_conv3x3_fwd", "upsample_concat_conv2d_relu", (x, skip), weight, mode)
    if launcher is not None:
        with _on_device(x):
            return launcher(x, skip, weight, bias, mode=mode, align_corners=align_corners, slope=slope, tf32=tf32())
    return _upsample_concat_conv2d_relu_torch(x, skip, weight, bias, mode, align_corners, slope)


@_upsample_concat_conv2d_relu.register_fake
def _(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, mode: str, align_corners: bool, slope: float
) -> Tensor:
    return _empty(skip, weight.shape[0], skip.shape[2], skip.shape[3])


def _save_upsample_conv(ctx, inputs, output) -> None:
    x, skip, weight, bias, ctx.mode, ctx.align_corners, ctx.slope = inputs
    ctx.bias_sizes = None if bias is None else [weight.shape[0]]
    ctx.save_for_backward(x, skip, weight, output)


def _upsample_concat_conv2d_relu_backward(ctx, grad: Tensor):
    x, skip, weight, y = ctx.saved_tensors
    need_x, need_skip, need_weight, need_bias = ctx.needs_input_grad[:4]
    grad = _activation_backward(grad, y, ctx.slope)
    both = reference.upsample_concat(x, skip, ctx.mode, ctx.align_corners)
    grad_both, grad_weight, grad_bias = _convolution_backward(
        grad, both, weight, ctx.bias_sizes, (need_x or need_skip, need_weight, need_bias)
    )
    return *_split_gradient(ctx, grad_both, x), grad_weight, grad_bias, None, None, None


_upsample_concat_conv2d_relu.register_autograd(_upsample_concat_conv2d_relu_backward, setup_context=_save_upsample_conv)


# --- conv_transpose2x2 -----------------------------------------------------------------------


def _conv_transpose2x2_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _channels_last(reference.conv_transpose2x2(_channels_last(x), weight, bias))


@torch.library.custom_op("fastunet::conv_transpose2x2", mutates_args=())
def _conv_transpose2x2(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    launcher = _launcher("conv_transpose2x2_fwd", "conv_transpose2x2", (x,), weight)
    if launcher is not None:
        with _on_device(x):
            return launcher(x, weight, bias, tf32=tf32())
    return _conv_transpose2x2_torch(x, weight, bias)


@_conv_transpose2x2.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _empty(x, weight.shape[1], 2 * x.shape[2], 2 * x.shape[3])


def _save_transpose(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.bias_sizes = None if bias is None else [weight.shape[1]]
    ctx.save_for_backward(x, weight)


def _conv_transpose2x2_backward(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    return aten.convolution_backward(
        grad, x, weight, ctx.bias_sizes, [2, 2], [0, 0], [1, 1], True, [0, 0], 1, ctx.needs_input_grad[:3]
    )


_conv_transpose2x2.register_autograd(_conv_transpose2x2_backward, setup_context=_save_transpose)


# --- what users call -------------------------------------------------------------------------


def _check(condition: bool, argument: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def _check_conv(x: Tensor, channels: int, weight: Tensor, bias: Tensor | None) -> None:
    _check(x.dim() == 4, "x", "shape (N, C, H, W)", tuple(x.shape))
    _check(weight.dim() == 4, "weight", "shape (O, C, K, K)", tuple(weight.shape))
    k = weight.shape[2]
    _check(k in (1, 3) and weight.shape[3] == k, "weight", "a 1x1 or 3x3 filter", tuple(weight.shape))
    _check(weight.shape[1] == channels, "weight", f"{channels} input channels", tuple(weight.shape))
    if bias is not None:
        _check(bias.shape == weight.shape[:1], "bias", f"shape ({weight.shape[0]},)", tuple(bias.shape))


def _check_alike(x: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None:
            _check(other.dtype == x.dtype, name, f"x's dtype {x.dtype}", other.dtype)
            _check(other.device == x.device, name, f"x's device {x.device}", other.device)


def _check_sources(x: Tensor, skip: Tensor, mode: str, modes: tuple[str, ...]) -> None:
    _check(mode in modes, "mode", f"one of {modes}", repr(mode))
    _check(x.dim() == 4, "x", "shape (N, C, H, W)", tuple(x.shape))
    _check(skip.dim() == 4, "skip", "shape (N, C, H, W)", tuple(skip.shape))
    _check(skip.shape[0] == x.shape[0], "skip", f"x's batch of {x.shape[0]}", tuple(skip.shape))


def _autocast(x: Tensor, *others: Tensor | None) -> tuple:
    """Cast to the autocast dtype, where autocast is on and the tensor is not float64."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others))


def _slope(relu: bool, negative_slope: float) -> float:
    _check(0 <= negative_slope < 1, "negative_slope", "a number in [0, 1)", negative_slope)
    return float(negative_slope) if relu else 1.0


@overload
def conv2d_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = True,
    negative_slope: float = 0.0,
    pool: Literal[False] = False,
) -> Tensor: ...


@overload
def conv2d_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = True,
    negative_slope: float = 0.0,
    pool: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def conv2d_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = True,
    negative_slope: float = 0.0,
    pool: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Same-size convolution, bias, ReLU and, on request, 2x2 max-pool, in one pass.

    Args:
        x: (N, C, H, W), any strides; float16, bfloat16, float32 (float64 through plain torch).
        weight: (O, C, 3, 3) or (O, C, 1, 1), of x's dtype; channels_last spares a copy.
        bias: (O,) or None.
        relu: apply the activation.
        negative_slope: of a leaky ReLU; 0 is the plain one.
        pool: also return the 2x2 max-pool.

    Returns:
        y (N, O, H, W), channels_last; with ``pool`` also (N, O, H // 2, W // 2).

    Raises:
        ValueError: names the argument, its value and what was expected.
    """
    x, weight, bias = _autocast(x, weight, bias)
    _check_conv(x, x.shape[1], weight, bias)
    _check_alike(x, weight=weight, bias=bias)
    slope = _slope(relu, negative_slope)
    if not pool:
        return (_conv2d_relu_torch if _at_once(x) else _conv2d_relu)(x, weight, bias, slope)
    _check(x.shape[2] >= 2 and x.shape[3] >= 2, "x", "H and W of at least 2 to pool", tuple(x.shape))
    return (_conv2d_relu_pool_torch if _at_once(x) else _conv2d_relu_pool)(x, weight, bias, slope)


def upsample_concat(x: Tensor, skip: Tensor, *, mode: str = "bilinear", align_corners: bool = True) -> Tensor:
    """``[upsampled, skip]`` on channels, in one pass.

    Args:
        x: (N, C1, h, w), any strides.
        skip: (N, C2, H, W), any strides. Where H or W differs from the doubled map, the map is
            zero-padded (or cropped) evenly, the odd pixel below or right.
        mode: ``"bilinear"`` or ``"nearest"``.

    Returns:
        (N, C1 + C2, H, W), channels_last. Errors as in :func:`conv2d_relu`.
    """
    dtype = torch.promote_types(x.dtype, skip.dtype)
    if torch.is_autocast_enabled(x.device.type):
        x, skip = x.to(dtype), skip.to(dtype)
    _check_sources(x, skip, mode, _UPSAMPLING)
    _check_alike(x, skip=skip)
    return (_upsample_concat_torch if _at_once(x) else _upsample_concat)(x, skip, mode, align_corners)


def upsample_concat_conv2d_relu(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mode: str = "bilinear",
    align_corners: bool = True,
    relu: bool = True,
    negative_slope: float = 0.0,
) -> Tensor:
    """3x3 :func:`conv2d_relu` of :func:`upsample_concat`, with neither map materialised.

    Args:
        x: (N, C1, h, w). skip: (N, C2, H, W). weight: (O, C1 + C2, 3, 3). bias: (O,) or None.
        mode: as there, or ``"none"`` for an x of the skip's scale.

    Returns:
        (N, O, H, W), channels_last. Errors as in :func:`conv2d_relu`.
    """
    x, skip, weight, bias = _autocast(x, skip, weight, bias)
    _check_sources(x, skip, mode, (*_UPSAMPLING, "none"))
    _check_conv(x, x.shape[1] + skip.shape[1], weight, bias)
    _check(weight.shape[2] == 3, "weight", "a 3x3 filter", tuple(weight.shape))
    _check_alike(x, skip=skip, weight=weight, bias=bias)
    slope = _slope(relu, negative_slope)
    op = _upsample_concat_conv2d_relu_torch if _at_once(x) else _upsample_concat_conv2d_relu
    return op(x, skip, weight, bias, mode, align_corners, slope)


def conv_transpose2x2(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """2x2 stride-2 transposed convolution and bias.

    Args:
        x: (N, C, H, W), any strides. weight: (C, O, 2, 2). bias: (O,) or None.

    Returns:
        (N, O, 2H, 2W), channels_last. Errors as in :func:`conv2d_relu`.
    """
    x, weight, bias = _autocast(x, weight, bias)
    _check(x.dim() == 4, "x", "shape (N, C, H, W)", tuple(x.shape))
    _check(
        weight.dim() == 4 and weight.shape[0] == x.shape[1] and tuple(weight.shape[2:]) == (2, 2),
        "weight", f"shape ({x.shape[1]}, O, 2, 2)", tuple(weight.shape),
    )  # fmt: skip
    if bias is not None:
        _check(bias.shape == weight.shape[1:2], "bias", f"shape ({weight.shape[1]},)", tuple(bias.shape))
    _check_alike(x, weight=weight, bias=bias)
    return (_conv_transpose2x2_torch if _at_once(x) else _conv_transpose2x2)(x, weight, bias)
