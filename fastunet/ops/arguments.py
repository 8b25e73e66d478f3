"""What the operators refuse: each error names the argument, what was expected and what was got.

Every call comes through here, of a small network on a CPU hundreds each second, so what would be said is put into
words only where it is said.
"""

from typing import Any

import torch
from torch import Tensor

UPSAMPLING = ("bilinear", "nearest")
_MATCH = ("zero_pad", "replicate_pad")
_PADDING = ("same", "valid")


def unexpected(argument: str, expected: object, got: object) -> ValueError:
    return ValueError(f"{argument}: expected {expected}, got {got}")


def slope_of(relu: bool, negative_slope: float) -> float:
    """The activation as a slope: 0 is a ReLU, 1 none."""
    if not 0 <= negative_slope < 1:
        raise unexpected("negative_slope", "a number in [0, 1)", negative_slope)
    return float(negative_slope) if relu else 1.0


def check_map(x: Tensor) -> None:
    if x.dim() != 4 or min(x.shape[1:]) == 0:
        raise unexpected("x", "shape (N, C, H, W), C, H and W at least 1", tuple(x.shape))


def check_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: str, pool: bool = False) -> None:
    check_map(x)
    check_filter(x.shape[1], weight, bias, padding)
    check_alike(x, weight=weight)
    check_bias(bias, x, weight)
    if not isinstance(stride, (tuple, list)) or [type(s) for s in stride] != [int, int] or min(stride) < 1:
        raise unexpected("stride", "two positive integers", stride)
    if pool and max(stride) > 1:
        raise unexpected("stride", "1 and 1 to pool", stride)
    lost = 0 if padding == "same" else weight.shape[2] - 1
    least = lost + 2 if pool else lost + bool(lost)
    if least and min(x.shape[2:]) < least:
        raise unexpected("x", f"H and W of at least {least}{' to pool' if pool else ''}", tuple(x.shape))


def check_filter(channels: int, weight: Tensor, bias: Tensor | None, padding: str) -> None:
    """Of a convolution of ``channels``."""
    if weight.dim() != 4 or len(weight) == 0:
        raise unexpected("weight", "shape (O, C, K, K), O at least 1", tuple(weight.shape))
    o, c, k, columns = weight.shape
    if k not in (1, 3) or columns != k:
        raise unexpected("weight", "a 1x1 or 3x3 filter", tuple(weight.shape))
    if c != channels:
        raise unexpected("weight", f"{channels} input channels", tuple(weight.shape))
    if bias is not None and bias.shape != (o,) and bias.shape != (2, o):
        raise unexpected("bias", f"shape ({o},) or (2, {o})", tuple(bias.shape))
    if padding not in _PADDING:
        raise unexpected("padding", f"one of {_PADDING}", repr(padding))


def check_alike(x: Tensor, **others: Tensor | None) -> None:
    """Of x's dtype and on its device."""
    for name, other in others.items():
        if other is None:
            continue
        if other.dtype != x.dtype:
            raise unexpected(name, f"x's dtype {x.dtype}", other.dtype)
        if other.device != x.device:
            raise unexpected(name, f"x's device {x.device}", other.device)


def check_bias(bias: Tensor | None, x: Tensor, *others: Tensor | None) -> None:
    """``others``: what gradients may be wanted of, beside x."""
    if bias is None or bias.dim() == 1:
        check_alike(x, bias=bias)
        return
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, *others)):
        raise unexpected("bias", "shape (O,), without factors, where gradients are wanted", tuple(bias.shape))
    if bias.dtype not in (torch.float32, x.dtype):
        raise unexpected("bias", f"float32 or x's dtype {x.dtype}", bias.dtype)
    if bias.device != x.device:
        raise unexpected("bias", f"x's device {x.device}", bias.device)


def check_head(x: Tensor, weight: Tensor, head: Tensor, head_bias: Tensor | None) -> None:
    """1x1 filters of what ``weight`` gives."""
    if head.dim() != 4 or len(head) == 0 or head.shape[1:] != (len(weight), 1, 1):
        raise unexpected("head", f"shape (K, {len(weight)}, 1, 1), K at least 1", tuple(head.shape))
    if head_bias is not None and head_bias.shape != head.shape[:1]:
        raise unexpected("head_bias", f"shape ({len(head)},)", tuple(head_bias.shape))
    check_alike(x, head=head, head_bias=head_bias)


def check_sources(x: Tensor, skip: Tensor, mode: str, modes: tuple[str, ...]) -> None:
    if mode not in modes:
        raise unexpected("mode", f"one of {modes}", repr(mode))
    check_map(x)
    if skip.dim() != 4 or min(skip.shape[2:]) == 0:
        raise unexpected("skip", "shape (N, C, H, W), H and W at least 1", tuple(skip.shape))
    if skip.shape[0] != x.shape[0]:
        raise unexpected("skip", f"x's batch of {x.shape[0]}", tuple(skip.shape))


def check_upsampled(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, mode: str, match: str, padding: str
) -> None:
    check_sources(x, skip, mode, (*UPSAMPLING, "none"))
    if match not in _MATCH:
        raise unexpected("match", f"one of {_MATCH}", repr(match))
    check_filter(x.shape[1] + skip.shape[1], weight, bias, padding)
    if weight.shape[2] != 3:
        raise unexpected("weight", "a 3x3 filter", tuple(weight.shape))
    if padding != "same" and min(skip.shape[2:]) < 3:
        raise unexpected("skip", "H and W of at least 3", tuple(skip.shape))
    check_alike(x, skip=skip, weight=weight)
    check_bias(bias, x, skip, weight)


def check_transposed(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_map(x)
    if weight.dim() != 4 or min(weight.shape) == 0 or weight.shape[0] != x.shape[1]:
        raise unexpected("weight", f"shape ({x.shape[1]}, O, R, S), each at least 1", tuple(weight.shape))
    if bias is not None and bias.shape != weight.shape[1:2]:
        raise unexpected("bias", f"shape ({weight.shape[1]},)", tuple(bias.shape))
    check_alike(x, weight=weight, bias=bias)


def check_norm(x: Tensor, summed: tuple[int, ...], pool: bool, **of_channels: Tensor | None) -> None:
    """``summed``: the axes of x over which statistics are taken."""
    if x.dim() != 4 or x.shape[1] == 0:
        raise unexpected("x", "shape (N, C, H, W), C at least 1", tuple(x.shape))
    if summed and all(x.shape[axis] == 1 for axis in summed):
        raise unexpected("x", "more than one value for each channel", tuple(x.shape))
    if pool and min(x.shape[2:]) < 2:
        raise unexpected("x", "H and W of at least 2 to pool", tuple(x.shape))
    for name, tensor in of_channels.items():
        if tensor is not None and tensor.shape != x.shape[1:2]:
            raise unexpected(name, f"shape ({x.shape[1]},)", tuple(tensor.shape))
        if tensor is not None and tensor.device != x.device:
            raise unexpected(name, f"x's device {x.device}", tensor.device)


def check_taken(x: Tensor, taken: Any, per_image: bool) -> None:
    """Statistics of x that came with it."""
    shape, dtype = tuple(x.shape[:2] if per_image else x.shape[1:2]), torch.promote_types(x.dtype, torch.float32)
    got = [(tuple(t.shape), t.dtype, t.device) if isinstance(t, Tensor) else t for t in taken]
    if got != [(shape, dtype, x.device)] * 3:
        raise unexpected("taken", f"three tensors {shape}, {dtype} on {x.device}", got)
