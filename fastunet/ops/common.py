"""What every operator asks: which implementation, in which memory, on which device."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import _C, Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._device import DeviceContext

from .. import dispatch


def takes_triton(x: Tensor) -> bool:
    return dispatch.choose(x.device, x.dtype).implementation == "triton"


def has_factors(bias: Tensor | None) -> bool:
    """Whether it is (2, O): a norm's factors and shifts."""
    return bias is not None and bias.dim() == 2


_watched: ContextVar[bool] = ContextVar("fastunet_watched", default=False)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Within the block every call goes through its registered operator, for who looks on by a mode."""
    token = _watched.set(True)
    try:
        yield
    finally:
        _watched.reset(token)


def is_watched() -> bool:
    """Whether a block of :func:`watched` is open."""
    return _watched.get()


_bare: ContextVar[bool] = ContextVar("fastunet_bare", default=False)


@contextlib.contextmanager
def bare() -> Iterator[None]:
    """Within the block operators are their bodies, for who looks on at what these do and wants no gradients."""
    token = _bare.set(True)
    try:
        yield
    finally:
        _bare.reset(token)


def at_once(x: Tensor) -> bool:
    """Whether torch's operators serve ``x`` without the dispatcher: on a CPU, without gradients, in eager."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling() or is_watched():
        return False
    # What nobody asked for does not run on a CPU; to look for the reason takes time.
    return not isinstance(x, FakeTensor) and (dispatch.asked_for() is None or not takes_triton(x))


class Operator:
    """A function that is registered with torch.library, and called around the dispatcher where nobody would notice.

    The way through it and Python back again costs a CPU 0.05 to 0.1 ms a call (benchmarks/NOTES.md).
    """

    def __init__(self, body: Callable[..., Any]) -> None:
        self.body = self.recorded = body
        self.registered = torch.library.custom_op(f"fastunet::{body.__name__}", body, mutates_args=())
        self.register_fake = self.registered.register_fake

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """What ``torch.library`` calls so; for calls around the dispatcher too."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        body = self.body

        def forward(ctx: Any, *arguments: Any) -> Any:
            result = body(*arguments)
            setup_context(ctx, arguments, result)
            return result

        functions = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.recorded = type(body.__name__, (torch.autograd.Function,), functions).apply

    def __call__(self, x: Tensor, *others: Any) -> Any:
        if not _unnoticed(x, others):
            return self.registered(x, *others)
        wanted = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, *others))
        return (self.recorded if wanted else self.body)(x, *others)


def _unnoticed(x: Tensor, others: tuple[Any, ...]) -> bool:
    """Whether neither a tracer, a transform, a mode nor a subclass of tensors wants to see a call."""
    if not torch.compiler.is_compiling() and _bare.get():
        return True
    if someone_looks_on() or x.device.type not in ("cpu", "cuda"):
        return False
    return all(type(t) in (Tensor, Parameter) for t in (x, *others) if isinstance(t, Tensor))


def someone_looks_on() -> bool:
    """Whether a tracer, a transform, a mode or a block of :func:`watched` wants to see each operator."""
    if torch.compiler.is_compiling() or is_watched() or _C._get_tracing_state() or forward_ad._current_level >= 0:
        return True
    if _C._len_torch_dispatch_stack() or peek_interpreter_stack():
        return True
    functions = _C._len_torch_function_stack()  # of which torch.set_default_device is one
    return any(type(_C._get_function_stack_at(i)) is not DeviceContext for i in range(functions))


def signature(x: Tensor) -> tuple[Any, ...]:
    """What all choices of a forward pass depend on, beside its weights."""
    autocast = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type)
    return x.shape, x.stride(), x.dtype, x.device, autocast, tf32(), dispatch.asked_for()


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch where the tensor lives: Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def tf32() -> bool:
    """Whether float32 convolutions may round their factors to tf32."""
    # Answers for torch.backends.cudnn.allow_tf32 too, and does not raise when the two APIs are mixed.
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]


REPEATABLE = True, False  # deterministic and benchmark, which may choose another algorithm in another process


@contextlib.contextmanager
def repeatable_cudnn() -> Iterator[None]:
    """Within the block cuDNN gives the same bits each time; its fastest gradients of weights do not."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = REPEATABLE
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


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
