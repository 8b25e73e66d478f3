"""Operators: registered with torch.library, and called around its dispatcher where nobody would notice."""

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
from torch import _C, Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._device import DeviceContext

from .. import dispatch
from ..sources import Kept
from .common import takes_triton
from .plan import Plan
from .planned import Instead, kind, planned
from .recorder import is_recording

KEPT = 4096  # plans of a device: of the operators of some fifty kinds of training steps, some kB each

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


def at_once(x: Tensor) -> bool:
    """Whether torch's operators serve ``x`` without the dispatcher: on a CPU, without gradients, in eager."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling() or is_watched():
        return False
    # What nobody asked for does not run on a CPU; to look for the reason takes time.
    return not isinstance(x, FakeTensor) and (dispatch.asked_for() is None or not takes_triton(x))


class Operator:
    """A function of tensors that is registered with torch.library.

    The way through the dispatcher and Python back again costs a CPU 0.05 to 0.1 ms a call, and of a GPU's body all but
    its launches some more (benchmarks/NOTES.md): calls go around it where nobody would notice, and bodies by their
    plans.
    """

    def __init__(self, body: Callable[..., Any]) -> None:
        @functools.wraps(body)
        def registered(*arguments: Any) -> Any:
            return (body if someone_looks_on() else self.by_plan)(*arguments)

        self._body, self.with_gradients = body, self.by_plan
        self.registered = torch.library.custom_op(f"fastunet::{body.__name__}", registered, mutates_args=())
        self.register_fake = self.registered.register_fake

    def by_plan(self, x: Tensor, *others: Any) -> Any:
        """What the body gives, without gradients."""
        if not _on_gpu(x) or is_recording():
            return self._body(x, *others)
        return _planned(self._body, self._body, (x, *others))

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """What ``torch.library`` calls so; for calls around the dispatcher too."""
        self.registered.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *arguments: Any) -> Any:
            result = self.by_plan(*arguments)
            setup_context(ctx, arguments, result)
            return result

        functions = {"forward": staticmethod(forward), "backward": staticmethod(_backward_by_plan(backward))}
        self.with_gradients = type(self._body.__name__, (torch.autograd.Function,), functions).apply

    def __call__(self, x: Tensor, *others: Any) -> Any:
        if not _unnoticed(x, others):
            return self.registered(x, *others)
        wanted = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, *others))
        return (self.with_gradients if wanted else self.by_plan)(x, *others)


def _backward_by_plan(backward: Callable[..., Any]) -> Callable[..., Any]:
    """An autograd function's backward, by one plan for all of its steps."""

    def by_plan(ctx: Any, *gradients: Tensor) -> Any:
        if not _on_gpu(gradients[0]) or torch.is_grad_enabled() or someone_looks_on():
            return backward(ctx, *gradients)
        saved, needed, how = ctx.saved_tensors, ctx.needs_input_grad, vars(ctx)
        unpacked = SimpleNamespace(saved_tensors=saved, needs_input_grad=needed, **how)  # once, as checkpoints want it
        run = lambda *_: backward(unpacked, *gradients)
        return _planned(backward, run, (*gradients, *saved), *needed, *how.items())

    return by_plan


_kept: dict[torch.device, Kept[Plan | Instead]] = {}


def _planned(of: Callable[..., Any], run: Callable[..., Any], arguments: Sequence[Any], *decided_by: Hashable) -> Any:
    """``run(*arguments)``, by a plan of the function ``of``."""
    if not _are_plain(arguments):
        return run(*arguments)
    device = arguments[0].device
    kept = _kept.get(device) or _kept.setdefault(device, Kept(KEPT))
    key = of, kind(*arguments, *decided_by)
    return planned(kept.made_from((), (dispatch.table(device),)), key, run, arguments)


def _are_plain(arguments: Iterable[Any]) -> bool:
    """Whether all tensors among them are that and no more, with memory of their own."""
    return all(type(t) in (Tensor, Parameter) and not t._is_zerotensor() for t in arguments if isinstance(t, Tensor))


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _unnoticed(x: Tensor, others: tuple[Any, ...]) -> bool:
    """Whether neither a tracer, a transform, a mode nor a subclass of tensors wants to see a call."""
    if not torch.compiler.is_compiling() and is_recording():
        return True
    if someone_looks_on() or x.device.type not in ("cpu", "cuda"):
        return False
    return _are_plain((x, *others))


def someone_looks_on() -> bool:
    """Whether a tracer, a transform, a mode or a block of :func:`watched` wants to see each operator."""
    if torch.compiler.is_compiling() or is_watched() or _C._get_tracing_state() or forward_ad._current_level >= 0:
        return True
    if _C._len_torch_dispatch_stack() or peek_interpreter_stack():
        return True
    functions = _C._len_torch_function_stack()  # of which torch.set_default_device is one
    return any(type(_C._get_function_stack_at(i)) is not DeviceContext for i in range(functions))
