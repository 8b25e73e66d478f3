"""How a plan is made: by looking on at a function's launches and its calls of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from .. import dispatch
from .common import is_repeatable
from .plan import Again, Allocate, Call, Free, Nothing, Plan, Step, View, replaced

if TYPE_CHECKING or dispatch.has_triton():
    from ..kernels.launch import Launch, seen
    from ..kernels.tensors import without_memory

_ALLOCATE = frozenset(
    f"aten::{name}" for name in ("empty.memory_format", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
)


class Unrepeatable(Exception):
    """A function does what a plan cannot."""


class Overlapping(Unrepeatable):
    """Arguments in the same memory, which the next ones of their kind need not be."""


_recording: ContextVar[bool] = ContextVar("fastunet_recording", default=False)


def is_recording() -> bool:
    """Whether a plan is being made: of all that is called, each launch is to be seen."""
    return _recording.get()


def recorded(run: Callable[..., Any], arguments: Sequence[Any], constants: Sequence[Tensor]) -> tuple[Any, Plan]:
    """``run(*arguments)``, and the plan of it; Unrepeatable for what a plan cannot do.

    Args:
        constants: what else's memory it may read: weights, of a whole forward pass.
    """
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    recorder = _Recorder(tensors, constants)
    token = _recording.set(True)
    try:
        with recorder, seen(recorder.launched):
            found = run(*arguments)
    finally:
        _recording.reset(token)
    single = isinstance(found, Tensor)
    results = tuple(recorder.result(t) for t in ((found,) if single else found))
    if tensors[0].is_cuda and any(t.numel() for t in recorder.made_once.values()):
        torch.cuda.synchronize(tensors[0].device)  # other streams may be about to read it
    slots = {result.slot for result in results if isinstance(result, View)}
    return found, Plan(tuple(_freed(recorder.steps, slots)), recorder.slots, results, single)


class _Slot(NamedTuple):
    """Memory as it was when the slot was filled: elements ``first`` to ``end`` of it."""

    number: int
    memory: StorageWeakRef
    dtype: torch.dtype
    first: Any
    end: Any
    shape: Any
    stride: Any

    def overlaps(self, x: Tensor) -> bool:
        """Whether they may share elements, of the same memory."""
        return x.dtype != self.dtype or (x.storage_offset() < self.end and self.first < _end(x))

    def holds(self, x: Tensor) -> bool:
        return x.dtype == self.dtype and self.first <= x.storage_offset() and _end(x) <= self.end


class _Recorder(TorchDispatchMode):
    """Writes steps down. A tensor's slot is told by its memory; what is in none must be a constant that is known."""

    def __init__(self, tensors: Sequence[Tensor], constants: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.slots = 0
        self.made_once: dict[int, Tensor] = {}  # constants that the pass itself makes, by address
        self._known = {_address(t) for t in constants}
        self._by_address: dict[int, list[_Slot]] = {}  # several, of arguments that are parts of the same memory
        for x in tensors:
            beside = self._by_address.get(_address(x), [])
            if x.numel() and any(slot.overlaps(x) for slot in beside):
                raise Overlapping
            self._fill_slot(x, beside)

    def _fill_slot(self, x: Tensor, beside: Sequence[_Slot] = ()) -> int:
        number = self.slots
        self.slots += 1
        if x.numel():
            memory, place = StorageWeakRef(x.untyped_storage()), (x.storage_offset(), _end(x))
            self._by_address[_address(x)] = [_Slot(number, memory, x.dtype, *place, x.shape, x.stride()), *beside]
        return number

    def place(self, x: Tensor) -> View | None:
        """Where in the slots' memory ``x`` is; None for a constant, and for what has no elements."""
        if not x.numel():
            return None
        # Of those that were let go another tensor may have the address since.
        slots = [slot for slot in self._by_address.get(_address(x), ()) if not slot.memory.expired()]
        for slot in slots:
            if slot.holds(x):
                offset = x.storage_offset() - slot.first
                whole = (x.shape, x.stride(), offset) == (slot.shape, slot.stride, 0)
                return View(slot.number, tuple(x.shape), x.stride(), offset, whole)
        if slots:
            raise Unrepeatable("memory of one tensor taken for another's")
        if _address(x) not in self._known and _address(x) not in self.made_once:
            raise Unrepeatable("memory that nobody saw being filled")
        return None

    def result(self, x: Tensor | None) -> View | Nothing | None:
        """How a plan gives ``x``."""
        if x is None:
            return None
        if not x.numel():
            return Nothing(tuple(x.shape), x.stride(), {"dtype": x.dtype, "device": x.device})
        place = self.place(x)
        if place is None:
            raise Unrepeatable("a result in memory of its own")
        return place

    def launched(self, launch: Launch) -> None:
        moving, fixed = [], list(launch.arguments)
        for i, argument in enumerate(launch.arguments):
            descriptor = argument if hasattr(argument, "block_shape") else None
            x = argument if descriptor is None else descriptor.base
            view = self.place(x) if isinstance(x, Tensor) else None
            if view is None and descriptor is None:
                fixed[i] = _constant(x)
            if view is not None:
                template = None if descriptor is None else without_memory(descriptor)
                moving.append((i, view.slot, view if view.offset else None, template))
                fixed[i] = None  # not to hold what is replaced
        self.steps.append(Again(launch.again, tuple(fixed), tuple(moving)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(func, torch._ops.OpOverload):
            raise Unrepeatable(f"{func} takes functions")
        schema = func._schema
        if f"{schema.name}.{schema.overload_name}".rstrip(".") in _ALLOCATE:
            options = {"dtype": result.dtype, "device": result.device}
            self.steps.append(Allocate(self._fill_slot(result), tuple(result.shape), result.stride(), options))
        elif schema.name != "aten::set_":  # which takes memory that is known
            results = enumerate(tree_flatten(result)[0])
            self._called(func, args, kwargs or {}, {i: t for i, t in results if t is not None})
        return result

    def _called(self, func: torch._ops.OpOverload, arguments: Any, options: Any, results: dict[int, Any]) -> None:
        given = tree_flatten((arguments, options))[0]
        addresses, changes = {_address(t) for t in given if isinstance(t, Tensor)}, func._schema.is_mutable
        # Views: by memory, for in inference mode ``to`` and ``contiguous`` come whole, which are views at times.
        if not changes and all(isinstance(t, Tensor) and _address(t) in addresses for t in results.values()):
            return
        if not all(isinstance(t, Tensor) for t in results.values()):
            if addresses:
                raise Unrepeatable(f"{func} gives what Python reads")
            return  # of dtypes and the like, which are the same for each input
        if changes and not addresses.isdisjoint(self.made_once):
            raise Unrepeatable(f"{func} changes what is made once")
        placed = tuple(replaced(a, Tensor, lambda t: self.place(t) or _constant(t)) for a in arguments)
        of_constants = bool(addresses) and not any(_views(placed))
        if of_constants and not changes and torch.Tag.nondeterministic_seeded not in func.tags:
            self.made_once |= {_address(t): t for t in results.values()}
            return
        if any(isinstance(t, Tensor) for t in tree_flatten(options)[0]):
            raise Unrepeatable(f"{func} takes tensors by name")
        new = tuple((i, self._fill_slot(t)) for i, t in results.items() if _address(t) not in addresses)
        self.steps.append(Call(func, placed, options, new, is_repeatable()))


def _views(arguments: Iterable[Any]) -> Iterator[View]:
    for argument in arguments:
        if type(argument) is View:
            yield argument
        elif type(argument) is list:
            yield from _views(argument)


def _constant(x: Any) -> Any:
    """An argument to be kept; of a tensor without elements not what it is a part of, nor a graph."""
    if not isinstance(x, Tensor) or x.numel():
        return x
    with _disable_current_modes():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _end(x: Tensor) -> Any:
    """The element of its memory behind its last one."""
    return x.storage_offset() + 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _freed(steps: list[Step], results: set[int]) -> Iterator[Step]:
    """The steps without memory that nothing reads, each slot let go of behind the last that reads it."""
    last = dict.fromkeys(results, len(steps))
    for i, step in enumerate(steps):
        last |= {slot: i for slot in _read(step) if slot not in results}
    for i, step in enumerate(steps):
        if isinstance(step, Allocate) and step.slot not in last:
            continue
        if isinstance(step, Call):
            step = replace(step, results=tuple(r for r in step.results if r[1] in last))
        yield step
        done = tuple(dict.fromkeys(slot for slot in _read(step) if last[slot] == i))
        if done:
            yield Free(done)


def _read(step: Step) -> tuple[int, ...]:
    if isinstance(step, Again):
        return tuple(slot for _, slot, _, _ in step.moving)
    if isinstance(step, Call):
        return tuple(view.slot for view in _views(step.arguments))
    return ()
