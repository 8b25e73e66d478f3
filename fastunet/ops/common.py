"""What every operator asks: which implementation, in which memory, on which device."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import dispatch

if TYPE_CHECKING or dispatch.has_triton():
    from .. import kernels


def takes_triton(x: Tensor) -> bool:
    return dispatch.choose(x.device, x.dtype).implementation == "triton"


def has_factors(bias: Tensor | None) -> bool:
    """Whether it is (2, O): a norm's factors and shifts."""
    return bias is not None and bias.dim() == 2


def signature(x: Tensor) -> tuple[Any, ...]:
    """What all choices of a forward pass depend on, beside its weights."""
    return x.shape, x.stride(), x.dtype, *surroundings(x.device)


def surroundings(device: torch.device) -> tuple[Any, ...]:
    """What choices on ``device`` depend on, beside what they are made for."""
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    # By the last two PyTorch chooses among operators of its own.
    deterministic, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.enabled
    return device, autocast, tf32(), dispatch.asked_for(), deterministic, cudnn


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch where the tensor lives: Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def tf32() -> bool:
    """Whether float32 convolutions may round their factors to tf32."""
    # Answers for torch.backends.cudnn.allow_tf32 too, and does not raise when the two APIs are mixed.
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]


def rounds_to_tf32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our kernels round weights that are of ``dtype`` on ``device``."""
    if dtype != torch.float32 or (device.type == "cpu" and dispatch.asked_for() is None):
        return False  # most calls, by a CPU
    return tf32() and dispatch.choose(device, dtype).implementation == "triton"


def rounded(weight: Tensor) -> Tensor:
    """``weight``, without gaps, as our kernels round it for tf32, who do not do so again."""
    with on_device(weight):
        return kernels.tf32.marked_as_rounded(kernels.tf32.rounded_weight(weight, tf32=True))


def is_rounded(weight: Tensor) -> bool:
    """Whether our kernels take it as rounded."""
    return dispatch.has_triton() and kernels.tf32.is_rounded(weight)


_repeatable: ContextVar[bool] = ContextVar("fastunet_repeatable", default=False)


@contextlib.contextmanager
def repeatable_cudnn() -> Iterator[None]:
    """Within the block cuDNN gives the same bits each time; its fastest gradients of weights do not."""
    cudnn = torch.backends.cudnn
    token = _repeatable.set(True)
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False  # which may choose another algorithm in another process
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
        _repeatable.reset(token)


def is_repeatable() -> bool:
    """Whether this thread is in a block of :func:`repeatable_cudnn`; cuDNN's flags are those of all threads."""
    return _repeatable.get()


def zeros(weight: Tensor, padding: str) -> int:
    """Rows and columns of zeros on each side of a convolution's map."""
    return weight.shape[-1] // 2 if padding == "same" else 0


def empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (like.shape[0], channels, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def channels_last(x: Tensor) -> Tensor:
    """``x`` with exactly the strides that :func:`empty` gives; copied only if its memory differs.

    Fake kernels promise these strides, and torch goes by them: strides of axes of size 1 are
    arbitrary, and a grey image with the wrong one would send its convolution to the slow layout.
    """
    if not x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
    strides = _strides(x)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def result(x: Tensor) -> Tensor:
    """:func:`channels_last` of what an operator gives: no view, which autograd would not let be changed in place."""
    if not x.is_contiguous(memory_format=torch.channels_last) or x.stride() == _strides(x):
        return channels_last(x)
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, _strides(x))


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    _, c, h, w = x.shape
    return h * w * c, 1, w * c, c
