"""An upsampled map of its skip's size, and its gradient: made where it is wanted, twice rather than kept."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, reference
from .common import channels_last, empty, on_device, result
from .operator import Operator

if TYPE_CHECKING or dispatch.has_triton():
    from .. import kernels

aten = torch.ops.aten


def fitted(x: Tensor, skip: Tensor, mode: str, align_corners: bool, match: str = "zero_pad") -> Tensor:
    """x upsampled, and padded or cropped to its skip's size."""
    x = channels_last(x)
    if mode == "bilinear":
        # F.interpolate takes another formula in PyTorch's deterministic mode, with other roundings.
        x = aten.upsample_bilinear2d(x, upsampled_size(x.shape[2], x.shape[3], mode), align_corners, 2.0, 2.0)
    else:
        x = reference.upsample(x, mode, align_corners)
    return reference.fit(x, skip, match)[0]


def is_replicated(x: Tensor, skip: Tensor, mode: str, match: str) -> bool:
    """Whether a border is to be repeated, which no kernel does on its way to a product."""
    return match == "replicate_pad" and upsampled_size(x.shape[2], x.shape[3], mode) != tuple(skip.shape[2:])


def launched(x: Tensor, skip: Tensor, mode: str, match: str) -> tuple[tuple[tuple[int, ...], ...], str]:
    """Shapes of the maps that a kernel is given, and how it upsamples the first."""
    if is_replicated(x, skip, mode, match):
        return ((*x.shape[:2], *skip.shape[2:]), tuple(skip.shape)), "none"
    return (tuple(x.shape), tuple(skip.shape)), mode


def upsampled_size(height: int, width: int, mode: str) -> tuple[int, int]:
    """Before padding."""
    scale = 1 if mode == "none" else 2
    return scale * height, scale * width


# An operator on every device: torch's bilinear backward cannot be traced with symbolic shapes.
@Operator
def upsample_backward(
    grad: Tensor, height: int, width: int, mode: str, align_corners: bool, match: str, kernel: bool
) -> Tensor:
    """Gradient of a (N, C, height, width) map from that of its upsampled, padded form."""
    n, c = grad.shape[:2]
    size = upsampled_size(height, width, mode)
    if match == "replicate_pad" or mode == "none" or not kernel:
        grad = _unpadded(grad, size, match)
    if mode == "none":
        return result(grad)
    if kernel:
        with on_device(grad):
            return kernels.upsample_bwd(grad, height, width, mode=mode, align_corners=align_corners)
    if mode == "bilinear" and grad.is_cuda:
        return result(bilinear_backward(grad, align_corners))
    if mode == "bilinear":
        return result(aten.upsample_bilinear2d_backward(grad, size, [n, c, height, width], align_corners, 2.0, 2.0))
    return result(aten.upsample_nearest2d_backward(grad, size, [n, c, height, width], 2.0, 2.0))


@upsample_backward.register_fake
def _(grad: Tensor, height: int, width: int, mode: str, align_corners: bool, match: str, kernel: bool) -> Tensor:
    return empty(grad, grad.shape[1], height, width)


def bilinear_backward(grad: Tensor, align_corners: bool) -> Tensor:
    """Gradient of a map from that of its upsampled form, as two matrix products: torch's on CUDA adds by atomics.

    In float64, which neither tf32 nor autocast rounds. A NaN or infinity spreads along its row and column.
    """
    wide = grad.double()

    def weights(doubled: int) -> Tensor:
        """(pixels of the map, pixels of its upsampled form)"""
        eye = torch.eye(doubled // 2, dtype=wide.dtype, device=wide.device)[None]
        return F.interpolate(eye, scale_factor=2, mode="linear", align_corners=align_corners)[0]

    return (weights(grad.shape[2]) @ wide @ weights(grad.shape[3]).t()).to(grad.dtype)


def _unpadded(grad: Tensor, size: tuple[int, int], match: str) -> Tensor:
    """Gradient of a map of ``size`` from that of its padded or cropped form: a tensor of its own."""
    left, right, top, bottom = reference.padding(size, (grad.shape[2], grad.shape[3]))
    for axis, before, after in ((2, top, bottom), (3, left, right)):
        # A negative pad crops what the forward padded.
        inner = F.pad(grad, [0, 0, -before, -after] if axis == 2 else [-before, -after])
        if match == "replicate_pad":  # torch's own adds the copies by atomics, in another order each time
            if before > 0:
                inner.select(axis, 0).add_(grad.narrow(axis, 0, before).sum(axis))
            if after > 0:
                inner.select(axis, -1).add_(grad.narrow(axis, grad.shape[axis] - after, after).sum(axis))
        grad = inner
    return grad
