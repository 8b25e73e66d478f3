"""What launchers do to tensors on the host: layouts, outputs, TMA descriptors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tf32 import rounded_weight, rounding, rounds
from .tuning import HEAD_CHANNELS, HEAD_CLASSES, ConvConfig, remembered

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Descriptor = TypeVar("Descriptor")


def without_graph(launcher: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A launcher that refuses what wants a gradient: autograd would not see the launch, and it would be missing."""

    @functools.wraps(launcher)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.is_grad_enabled() and any(map(_wants_gradient, (*args, *kwargs.values()))):
            given = inspect.signature(launcher).bind(*args, **kwargs).arguments
            name = next(name for name, value in given.items() if _wants_gradient(value))
            raise ValueError(
                f"{name}: expected no tensor that requires a gradient, got one, and {launcher.__name__} gives none; "
                "call fastunet.ops, or this under torch.no_grad()"
            )
        return launcher(*args, **kwargs)

    return checked


def _wants_gradient(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_wants_gradient, value))
    return isinstance(value, Tensor) and value.requires_grad


def unit_channel_stride(x: Tensor) -> Tensor:
    """``x`` (N, C, H, W) with adjacent channels adjacent in memory; copied only if it is not so.

    Rows and columns must also be near enough for the offset of a filter tap to fit in 32 bits.
    """
    near = x.stride(2) < 2**30 and x.stride(3) < 2**30
    return x if near and (x.shape[1] == 1 or x.stride(1) == 1) else x.contiguous(memory_format=torch.channels_last)


def empty_channels_last(x: Tensor, channels: int, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised (N, channels, height, width) beside ``x``, of its dtype or another, in channels_last memory."""
    shape = (x.shape[0], channels, height, width)
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


def convolved_size(x: Tensor, ksize: int, stride: tuple[int, int], pad: int) -> tuple[int, int]:
    """(H, W) of the convolution of x with ``pad`` zeros on each side."""
    (height, width), (rows, columns) = x.shape[2:], stride
    return (height + 2 * pad - ksize) // rows + 1, (width + 2 * pad - ksize) // columns + 1


def placed(x: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
    """``x`` in the middle of a map of this size: a view, cropped where it is larger, and its first row and column.

    The odd row or column that is left, or cut, is below or right, or above or left.
    """
    top, left = (height - x.shape[2]) // 2, (width - x.shape[3]) // 2
    rows, columns = max(0, -top), max(0, -left)
    return x[:, :, rows : rows + height, columns : columns + width], max(0, top), max(0, left)


def bias_or_zeros(bias: Tensor | None, channels: int, like: Tensor) -> Tensor:
    """The bias, or zeros for so many channels.

    Not a branch in the kernel: without an addition after the loop, the ptxas of Triton 3.6.0
    serialises the tf32 WGMMAs (C7515).
    """
    return like.new_zeros(channels) if bias is None else bias.contiguous()


def scaled(bias: Tensor | None) -> bool:
    """Whether it is (2, O): factors of the channels' sums, and what is added to those."""
    return bias is not None and bias.dim() == 2


def without_factors(bias: Tensor | None) -> None:
    """ValueError for a bias (2, O)."""
    if bias is not None and bias.dim() != 1:
        raise ValueError(f"bias: expected shape (O,), of a transposed convolution, got {tuple(bias.shape)}")


def head_operands(head: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a 1x1 head behind a convolution, each contiguous; ValueError for what no tile holds."""
    classes, channels = head.shape[:2]
    if classes > HEAD_CLASSES or channels > HEAD_CHANNELS:
        most = f"at most {HEAD_CLASSES} classes of {HEAD_CHANNELS} channels"
        raise ValueError(f"head: expected {most}, got {tuple(head.shape)}")
    return head.contiguous(), bias_or_zeros(bias, classes, head)


def flipped_weight(weight: Tensor) -> Tensor:
    """(O, C, K, K) of a convolution -> (C, O, K, K) of the one that gives its input's gradient."""
    return weight.flip(2, 3).transpose(0, 1)


def packed_weight(weight: Tensor, tf32: bool) -> Tensor:
    """(O, C, K, K) -> (O, K * K * C) rows, rounded for products in tf32.

    Free when the weight is channels_last already, and rounded where it needs to be.
    """
    return rounded_weight(weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).contiguous(), tf32, of=weight)


def tma_serves(x: Tensor) -> bool:
    """Whether a TMA descriptor can address ``x`` (N, C, H, W): 16-byte base, strides and rows."""
    if x.numel() == 0 or x.data_ptr() % 16 or x.stride(1) != 1 or max(x.shape) >= 2**31:
        return False
    return all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in (x.stride(0), x.stride(2), x.stride(3)))


def pixel_descriptor(x: Tensor, config: ConvConfig, tf32: bool) -> TensorDescriptor:
    """TMA boxes of (block_n, block_h, block_w, block_k) of ``x``, seen as NHWC; rounded for products in tf32."""
    box = config.block_n, config.block_h, config.block_w, config.block_k
    return _descriptor(x.permute(0, 2, 3, 1), box, rounds(x.dtype, tf32))


def weight_descriptor(rows: Tensor, config: ConvConfig) -> TensorDescriptor:
    """TMA boxes of (block_co, block_k) of packed weight rows."""
    return _descriptor(rows, (config.block_co, config.block_k))


def _descriptor(x: Tensor, box: tuple[int, ...], to_tf32: bool = False) -> TensorDescriptor:
    return described(x, _checked_descriptor(x.shape, x.stride(), box, x.dtype, to_tf32))


@remembered
def _checked_descriptor(
    shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], dtype: torch.dtype, to_tf32: bool
) -> TensorDescriptor:
    return TensorDescriptor(no_memory(dtype), list(shape), list(strides), list(box), **rounding(to_tf32))


def no_memory(dtype: torch.dtype) -> Tensor:
    """What a descriptor is of before it is of a tensor."""
    return torch.empty(0, dtype=dtype, device="meta")


def described(x: Tensor, checked: Descriptor) -> Descriptor:
    """``checked``, of the aligned memory of ``x``: its own checks take a host as long as all else of a launch."""
    if x.data_ptr() % 16:
        raise ValueError(f"x: expected memory aligned to 16 bytes, for TMA, got a map at {x.data_ptr():#x}")
    return _of(x, checked)


def without_memory(descriptor: Descriptor) -> Descriptor:
    """``descriptor`` for :func:`described`, which does not hold what it describes."""
    return _of(None, descriptor)


def _of(x: Tensor | None, checked: Descriptor) -> Descriptor:
    descriptor = object.__new__(type(checked))
    descriptor.__dict__.update(checked.__dict__, base=x)
    return descriptor
