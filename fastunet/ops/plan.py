"""What a function of tensors makes of them as its launches in a row, without the Python between them.

Checks, choices, descriptors, and Triton's own look at every argument take a host longer than small maps take a GPU
(benchmarks/NOTES.md). They depend on the kind of arguments alone, so they are made once: what the function allocates,
launches and calls of PyTorch is written down, and done again for the next arguments of that kind. Memory is allocated
and let go as when it was recorded, and results are the same to the bit.

A plan is of a single operator (:mod:`fastunet.ops.operator`) or of a whole forward pass (:mod:`fastunet.plan`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .. import dispatch
from ..sources import Generation
from .common import REPEATABLE, on_device, repeatable_cudnn, surroundings

if TYPE_CHECKING or dispatch.has_triton():
    from ..kernels.launch import Launch, seen
    from ..kernels.tensors import described, without_memory

Run = Callable[..., Any]  # from tensors and what goes with them to a tensor or several
Held = list[Any]  # tensors by slot; the arguments' come first

_ALLOCATE = frozenset(
    f"aten::{name}" for name in ("empty.memory_format", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
)


class Instead(Enum):
    """What is kept in a plan's place."""

    ONCE = "this kind of arguments came once"
    NEVER = "no plan can do what the function does"


class Unrepeatable(Exception):
    """A function does what a plan cannot."""


def kind(*arguments: Any) -> Hashable:
    """What decides what a function does with them, but for the values in tensors, of which the first one is."""
    found = [
        (a.shape, a.stride(), a.dtype, a.data_ptr() % 16)  # code is compiled for aligned memory apart
        if isinstance(a, Tensor)
        else tuple(a)
        if isinstance(a, list)
        else a
        for a in arguments
    ]
    return *found, *surroundings(arguments[0].device), torch.is_inference_mode_enabled(), _cudnn()


def planned(
    kept: Generation[Plan | Instead],
    key: Hashable,
    run: Run,
    arguments: Sequence[Any],
    constants: Callable[[], Sequence[Tensor] | None] = tuple,
) -> Any:
    """``run(*arguments)``: by a plan, when the key comes for the third time, which is made at the second.

    Args:
        key: of ``run`` and the :func:`kind` of its arguments.
        constants: asked before a plan is made: all memory beside the arguments' that it may read; None if none may be
            made.
    """
    plan = kept.find(key)
    if isinstance(plan, Plan):
        return plan(*arguments)
    if plan is None:
        found, plan = run(*arguments), Instead.ONCE  # which compiles kernels and lays out weights
    elif plan is Instead.NEVER or (known := constants()) is None:
        found, plan = run(*arguments), Instead.NEVER
    else:
        try:
            found, plan = recorded(run, arguments, known)
        except Unrepeatable:
            found, plan = run(*arguments), Instead.NEVER
    kept.keep(key, plan)
    return found


_recording: ContextVar[bool] = ContextVar("fastunet_recording", default=False)


def is_recording() -> bool:
    """Whether a plan is being made: of all that is called, each launch is to be seen."""
    return _recording.get()


class View(NamedTuple):
    """A tensor in a slot's memory, ``offset`` elements behind its start.

    Attributes:
        whole: whether that is just what is in the slot.
    """

    slot: int
    size: Sequence[Any]
    stride: Sequence[Any]
    offset: Any
    whole: bool

    def of(self, held: Held) -> Tensor:
        tensor = held[self.slot]
        return tensor if self.whole else tensor.as_strided(*self._place(tensor))

    def result(self, held: Held) -> Tensor:
        """No view of another tensor, which autograd would not let be changed in place."""
        tensor = held[self.slot]
        if self.whole:
            return tensor
        size, stride, offset = self._place(tensor)
        return tensor.new_empty(0).set_(tensor.untyped_storage(), offset, size, stride)

    def _place(self, tensor: Tensor) -> tuple[Any, Any, Any]:
        return self.size, self.stride, tensor.storage_offset() + self.offset


class Nothing(NamedTuple):
    """A result without elements."""

    size: Sequence[Any]
    stride: Sequence[Any]
    options: dict[str, Any]

    def result(self, held: Held) -> Tensor:
        return torch.empty_strided(self.size, self.stride, **self.options)


@dataclass(frozen=True)
class Allocate:
    """New memory in a slot."""

    slot: int
    size: Sequence[Any]
    stride: Sequence[Any]
    options: dict[str, Any]

    def __call__(self, held: Held) -> None:
        held[self.slot] = torch.empty_strided(self.size, self.stride, **self.options)


@dataclass(frozen=True)
class Again:
    """A kernel on other memory.

    Attributes:
        moving: (argument, slot, view or None where it begins with the slot, descriptor or None) of those whose memory
            is a slot's.
    """

    launch: Callable[..., object]
    arguments: tuple[Any, ...]
    moving: tuple[tuple[int, int, View | None, Any], ...]

    def __call__(self, held: Held) -> None:
        arguments = list(self.arguments)
        for i, slot, view, descriptor in self.moving:
            x = held[slot] if view is None else view.of(held)
            arguments[i] = x if descriptor is None else described(x, descriptor)
        self.launch(*arguments)


@dataclass(frozen=True)
class Call:
    """One of PyTorch's own operators on other memory.

    Attributes:
        arguments: a view in the place of each tensor in a slot's memory. options: among which is none.
        results: (which, slot) of those that are new memory.
        repeats: whether cuDNN is asked to repeat.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    results: tuple[tuple[int, int], ...]
    repeats: bool

    def __call__(self, held: Held) -> None:
        arguments = [_replaced(a, View, lambda view: view.of(held)) for a in self.arguments]
        with repeatable_cudnn() if self.repeats else contextlib.nullcontext():
            found = self.function(*arguments, **self.options)
        if isinstance(found, Tensor):
            found = (found,)
        for i, slot in self.results:
            held[slot] = found[i]


def _replaced(argument: Any, of: type[Any], by: Callable[[Any], Any]) -> Any:
    """An operator's argument, or those in its list, by another where it is of the type."""
    if isinstance(argument, of):
        return by(argument)
    return [_replaced(a, of, by) for a in argument] if type(argument) in (list, tuple) else argument


@dataclass(frozen=True)
class Free:
    """Lets go of memory that no later step reads."""

    slots: tuple[int, ...]

    def __call__(self, held: Held) -> None:
        for slot in self.slots:
            held[slot] = None


Step = Allocate | Again | Call | Free


@dataclass(frozen=True)
class Plan:
    """The steps that a function takes, and where its results are.

    Attributes:
        single: whether there is one result, not a tuple.
    """

    steps: tuple[Step, ...]
    slots: int
    results: tuple[View | Nothing | None, ...]
    single: bool

    def __call__(self, *arguments: Any) -> Any:
        held: Held = [a for a in arguments if isinstance(a, Tensor)]
        held += [None] * (self.slots - len(held))
        with on_device(arguments[0]):
            for step in self.steps:
                step(held)
            found = [None if result is None else result.result(held) for result in self.results]
        return found[0] if self.single else tuple(found)


def recorded(run: Run, arguments: Sequence[Any], constants: Sequence[Tensor]) -> tuple[Any, Plan]:
    """``run(*arguments)``, and the plan of it; Unrepeatable for what a plan cannot do.

    Args:
        constants: weights, whose memory it may read.
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
    if recorder.made_once and tensors[0].is_cuda:
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


class _Recorder(TorchDispatchMode):
    """Writes steps down. A tensor's slot is told by its memory; what is in none must be a constant that is known."""

    def __init__(self, tensors: Sequence[Tensor], constants: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.slots = 0
        self.made_once: dict[int, Tensor] = {}  # constants that the pass itself makes, by address
        self._known = {_address(t) for t in constants}
        self._by_address: dict[int, _Slot] = {}
        self._cudnn = _cudnn()
        full = [_address(x) for x in tensors if x.numel()]
        if len(set(full)) < len(full):
            raise Unrepeatable("several arguments in the same memory")
        for x in tensors:
            self._fill_slot(x)

    def _fill_slot(self, x: Tensor) -> int:
        memory, number = StorageWeakRef(x.untyped_storage()), self.slots
        place = x.storage_offset(), _end(x), x.shape, x.stride()
        self._by_address[_address(x)] = _Slot(number, memory, x.dtype, *place)
        self.slots += 1
        return number

    def place(self, x: Tensor) -> View | None:
        """Where in the slots' memory ``x`` is; None for a constant."""
        slot = self._by_address.get(_address(x))
        if slot is None or slot.memory.expired() or not x.numel():  # another's address since it was let go
            if x.numel() and _address(x) not in self._known and _address(x) not in self.made_once:
                raise Unrepeatable("memory that nobody saw being filled")
            return None
        if x.dtype != slot.dtype or x.storage_offset() < slot.first or _end(x) > slot.end:
            raise Unrepeatable("memory of one tensor taken for another's")
        offset = x.storage_offset() - slot.first
        return View(slot.number, tuple(x.shape), x.stride(), offset, (x.shape, x.stride(), offset) == (*slot[-2:], 0))

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
        placed = tuple(_replaced(a, Tensor, lambda t: self.place(t) or t) for a in arguments)
        of_constants = bool(addresses) and not any(_views(placed))
        if of_constants and not changes and torch.Tag.nondeterministic_seeded not in func.tags:
            self.made_once |= {_address(t): t for t in results.values()}
            return
        repeats = _cudnn() != self._cudnn
        if any(isinstance(t, Tensor) for t in tree_flatten(options)[0]):
            raise Unrepeatable(f"{func} takes tensors by name")
        if repeats and _cudnn() != REPEATABLE:
            raise Unrepeatable("the pass sets what cuDNN may do")
        new = tuple((i, self._fill_slot(t)) for i, t in results.items() if _address(t) not in addresses)
        self.steps.append(Call(func, placed, options, new, repeats))


def _views(arguments: Iterable[Any]) -> Iterator[View]:
    for argument in arguments:
        if type(argument) is View:
            yield argument
        elif type(argument) is list:
            yield from _views(argument)


def _cudnn() -> tuple[bool, bool]:
    return torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark


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
