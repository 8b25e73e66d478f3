"""The fused operators: the only home of torch.library names.

Each is one custom operator with a fake kernel, so that ``torch.compile`` traces through it, an
autograd formula (but for ``conv2d_relu_head``, whose gradients are those of two others), and a body
that asks :mod:`fastunet.dispatch` whether a Triton kernel or the plain reference computes it
(``forward.py``, ``backward.py``). The functions here are what users call: they check their
arguments, apply the autocast rule, and speak logical NCHW.

Autocast: convolutions run in the autocast dtype, as ``torch.conv2d`` does; ``upsample_concat``
takes the widest dtype of its inputs, as ``torch.cat`` does. float64 is left alone.

The dispatcher, whose way through Python to a custom operator and back costs 0.1 ms, much to a small network, is gone
around where no mode, tracer or subclass looks on (``operator.py``); on a GPU what an operator launches is written down
and repeated without the Python between (``plan.py``). Without gradients a CPU calls torch's own operators at once.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import dispatch
from . import forward, moments
from .arguments import (
    UPSAMPLING,
    check_alike,
    check_conv2d,
    check_head,
    check_norm,
    check_sources,
    check_taken,
    check_transposed,
    check_upsampled,
    slope_of,
    unexpected,
)
from .common import tf32
from .launchers import choose
from .operator import at_once, is_watched, watched
from .upsampling import launched

__all__ = [
    "batch_norm_relu",
    "choose",
    "conv2d_moments",
    "conv2d_relu",
    "conv2d_relu_head",
    "conv_transpose2x2",
    "instance_norm_relu",
    "is_watched",
    "tf32",
    "upsample_concat",
    "upsample_concat_conv2d_moments",
    "upsample_concat_conv2d_relu",
    "watched",
]

Statistics = tuple[Tensor, Tensor, Tensor]  # mean, 1 / sqrt(variance + eps), unbiased variance


def _autocast(x: Tensor, *others: Tensor | None) -> tuple:
    """Cast to the autocast dtype, where autocast is on, what is not float64; factors of channels, (2, O), stay."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 or t.dim() == 2 else t.to(dtype) for t in (x, *others))


@overload
def conv2d_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = True,
    negative_slope: float = 0.0,
    pool: Literal[False] = False,
    stride: tuple[int, int] = (1, 1),
    padding: str = "same",
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
    stride: tuple[int, int] = (1, 1),
    padding: str = "same",
) -> tuple[Tensor, Tensor]: ...


def conv2d_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = True,
    negative_slope: float = 0.0,
    pool: bool = False,
    stride: tuple[int, int] = (1, 1),
    padding: str = "same",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolution, bias, ReLU and, on request, 2x2 max-pool, in one pass.

    Args:
        x: (N, C, H, W), any strides; float16, bfloat16, float32 (float64 through plain torch).
        weight: (O, C, 3, 3) or (O, C, 1, 1), of x's dtype; channels_last spares a copy.
        bias: (O,) or None. Or (2, O), float32 or of x's dtype, without gradients: what the channels' sums are
            multiplied by and what is added then, as a batch norm does. Kernels round the result alone; PyTorch's
            path rounds the sums too, as eager does, and overflows where that does.
        relu: apply the activation.
        negative_slope: of a leaky ReLU; 0 is the plain one.
        pool: also return the 2x2 max-pool.
        stride: (rows, columns). padding: ``"same"``, K // 2 zeros on each side, or ``"valid"``, none.

    Returns:
        y (N, O, H, W), channels_last; with ``pool`` also (N, O, H // 2, W // 2). Smaller by stride and padding.

    Raises:
        ValueError: names the argument, its value and what was expected.
    """
    x, weight, bias = _autocast(x, weight, bias)
    check_conv2d(x, weight, bias, stride, padding, pool)
    given = x, weight, bias, slope_of(relu, negative_slope), stride, padding
    if not pool:
        return (forward.conv2d_relu_torch if at_once(x) else forward.conv2d_relu)(*given)
    return (forward.conv2d_relu_pool_torch if at_once(x) else forward.conv2d_relu_pool)(*given)


def conv2d_relu_head(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Tensor,
    head_bias: Tensor | None = None,
    *,
    relu: bool = True,
    negative_slope: float = 0.0,
) -> Tensor:
    """:func:`conv2d_relu`, then a 1x1 convolution without an activation: if it can be, in one pass.

    The map between is then never written. Where gradients are wanted, which need it, these are two operators; so
    they are for more than 64 channels between or 16 classes, and where a table has it so.

    Args:
        x, weight, bias, relu, negative_slope: as there, of a stride of 1 and ``"same"`` padding.
        head: (K, O, 1, 1). head_bias: (K,) or None.

    Returns:
        (N, K, H, W), channels_last. Errors as there.
    """
    x, weight, bias, head, head_bias = _autocast(x, weight, bias, head, head_bias)
    check_conv2d(x, weight, bias, (1, 1), "same")
    check_head(x, weight, head, head_bias)
    given = x, weight, bias, head, head_bias
    if at_once(x):
        return forward.conv2d_relu_head_torch(*given, slope_of(relu, negative_slope))
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if wanted or (not torch.compiler.is_compiling() and is_watched()):
        y = conv2d_relu(x, weight, bias, relu=relu, negative_slope=negative_slope)
        return conv2d_relu(y, head, head_bias, relu=False)
    return forward.conv2d_relu_head(*given, slope_of(relu, negative_slope))


def conv2d_moments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    per_image: bool,
    stride: tuple[int, int] = (1, 1),
    padding: str = "same",
) -> tuple[Tensor, Statistics | None]:
    """:func:`conv2d_relu` without an activation, and what a norm behind it wants, if it comes in the same pass.

    Args:
        x, weight, bias, stride, padding: as there.
        eps: of the norm. per_image: whether each image has statistics of its own, as of an instance norm.

    Returns:
        (N, O, H, W), channels_last, and ``taken`` of :func:`batch_norm_relu` and :func:`instance_norm_relu`: (O,) or
        (N, O) each, float32; None where no kernel gives it. Errors as there.
    """
    x, weight, bias = _autocast(x, weight, bias)
    check_conv2d(x, weight, bias, stride, padding)
    if not _come_free("conv2d_relu", (tuple(x.shape),), weight, geometry=dispatch.geometry(stride, padding)):
        return conv2d_relu(x, weight, bias, relu=False, stride=stride, padding=padding), None
    y, mean, rstd, variance = moments.conv2d_moments(x, weight, bias, stride, padding, eps, per_image)
    return y, (mean, rstd, variance)


def _come_free(op: str, maps: Any, weight: Tensor, mode: str = "none", geometry: str = "") -> bool:
    """Whether the kernel that makes a map gives its moments too: one of Hopper's.

    No in code that is compiled, whose shapes may be symbols.
    """
    if torch.compiler.is_compiling():
        return False
    of = maps, tuple(weight.shape), weight.device, weight.dtype
    return choose(op, *of, mode, geometry=geometry).implementation == "hopper"


def batch_norm_relu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = True,
    negative_slope: float = 0.0,
    pool: bool = False,
    taken: Statistics | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Batch norm, ReLU and, on request, 2x2 max-pool.

    Args:
        x: (N, C, H, W), any strides; float16, bfloat16, float32 (float64 through plain torch).
        weight, bias: (C,) of any of these dtypes, gamma and beta; None for 1 and 0.
        running_mean, running_var: (C,), fixed statistics; by default those of the batch are taken.
        eps: added to the variance.
        relu, negative_slope, pool: as in :func:`conv2d_relu`.
        taken: x's own statistics, of :func:`conv2d_moments` and the same ``eps``, which are then not taken again.

    Returns:
        y (N, C, H, W), channels_last; its max-pool or None; mean and variance of each channel (C,), unbiased if it is
        the batch's, without gradients, float32 or wider. Errors as in :func:`conv2d_relu`.
    """
    fixed = None if running_mean is None or running_var is None else (running_mean, running_var)
    if fixed is None and running_mean is not running_var:
        raise unexpected("running_var", "None or a tensor as running_mean is", running_var)
    if taken is not None and fixed is not None:
        raise unexpected("taken", "None beside running_mean and running_var", "both")
    given = weight, bias, running_mean, running_var, eps, slope_of(relu, negative_slope), pool, False
    summed = (0, 2, 3) if fixed is None else ()
    check_norm(x, summed, pool, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    if taken is not None:
        y, pooled = _norm_of_taken(x, weight, bias, taken, *given[4:])
        mean, _, variance = taken
    elif not at_once(x):
        y, pooled, mean, _, variance = forward.norm_relu(x, *given, None)
    else:
        y, pooled = forward.norm_relu_torch(x, *given)
        mean, variance = fixed or forward.statistics_torch(x, eps, False)[::2]
        mean, variance = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (mean, variance))
    return y, pooled if pool else None, mean, variance


def instance_norm_relu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relu: bool = True,
    negative_slope: float = 0.0,
    pool: bool = False,
    taken: Statistics | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`batch_norm_relu`, each image by statistics of its own.

    Returns:
        y (N, C, H, W), channels_last; its max-pool or None.
    """
    given = x, weight, bias, None, None, eps, slope_of(relu, negative_slope), pool, True
    check_norm(x, (2, 3), pool, weight=weight, bias=bias)
    if taken is not None:
        y, pooled = _norm_of_taken(x, weight, bias, taken, *given[5:])
    else:
        y, pooled, *_ = forward.norm_relu_torch(*given) if at_once(x) else forward.norm_relu(*given, None)
    return y, pooled if pool else None


def _norm_of_taken(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, taken: Statistics, *options: Any
) -> tuple[Tensor, Tensor]:
    check_taken(x, taken, options[-1])
    mean, rstd, variance = (t.contiguous() for t in taken)
    return forward.norm_relu(x, weight, bias, mean, variance, *options, rstd)[:2]


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
    check_sources(x, skip, mode, UPSAMPLING)
    check_alike(x, skip=skip)
    return (forward.upsample_concat_torch if at_once(x) else forward.upsample_concat)(x, skip, mode, align_corners)


def upsample_concat_conv2d_relu(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mode: str = "bilinear",
    align_corners: bool = True,
    match: str = "zero_pad",
    relu: bool = True,
    negative_slope: float = 0.0,
    padding: str = "same",
) -> Tensor:
    """3x3 :func:`conv2d_relu` of :func:`upsample_concat`, with neither map materialised.

    Args:
        x: (N, C1, h, w). skip: (N, C2, H, W); C2 may be 0. weight: (O, C1 + C2, 3, 3). bias: as there.
        mode: as there, or ``"none"`` for an x of the skip's scale.
        match: ``"zero_pad"``, or ``"replicate_pad"`` to pad with the upsampled map's own border.
        padding: as there, of the convolution.

    Returns:
        (N, O, H, W), channels_last; H - 2 and W - 2 if ``"valid"``. Errors as in :func:`conv2d_relu`.
    """
    x, skip, weight, bias = _autocast(x, skip, weight, bias)
    check_upsampled(x, skip, weight, bias, mode, match, padding)
    slope = slope_of(relu, negative_slope)
    op = forward.upsample_concat_conv2d_relu_torch if at_once(x) else forward.upsample_concat_conv2d_relu
    return op(x, skip, weight, bias, mode, align_corners, slope, match, padding)


def upsample_concat_conv2d_moments(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    per_image: bool,
    mode: str = "bilinear",
    align_corners: bool = True,
    match: str = "zero_pad",
    padding: str = "same",
) -> tuple[Tensor, Statistics | None]:
    """:func:`conv2d_moments` of :func:`upsample_concat`; arguments as of :func:`upsample_concat_conv2d_relu`."""
    x, skip, weight, bias = _autocast(x, skip, weight, bias)
    check_upsampled(x, skip, weight, bias, mode, match, padding)
    maps, scaled = launched(x, skip, mode, match)
    how = mode, align_corners, match, padding
    if not _come_free("upsample_concat_conv2d_relu", maps, weight, scaled, dispatch.geometry((1, 1), padding)):
        options: Any = {"mode": mode, "align_corners": align_corners, "match": match, "padding": padding}
        return upsample_concat_conv2d_relu(x, skip, weight, bias, relu=False, **options), None
    y, mean, rstd, variance = moments.upsample_concat_conv2d_moments(x, skip, weight, bias, *how, eps, per_image)
    return y, (mean, rstd, variance)


def conv_transpose2x2(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Transposed convolution whose stride is the filter's size, 2x2 as a rule, and bias.

    Args:
        x: (N, C, H, W), any strides. bias: (O,) or None.
        weight: (C, O, 2, 2). Or (C, O, R, S), of a stride of R and S.

    Returns:
        (N, O, R H, S W), channels_last. Errors as in :func:`conv2d_relu`.
    """
    x, weight, bias = _autocast(x, weight, bias)
    check_transposed(x, weight, bias)
    return (forward.conv_transpose2x2_torch if at_once(x) else forward.conv_transpose2x2)(x, weight, bias)
