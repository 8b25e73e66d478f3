"""A forward pass as its launches in a row, without the Python between them.

Checks, choices, descriptors, and Triton's own look at every argument take a host longer than small maps take a GPU
(benchmarks/NOTES.md). They depend on the kind of input and on the weights alone, so they are made once: what a forward
pass allocates, launches and calls of PyTorch is written down, and done again for the next input of that kind. Memory is
allocated and let go as in the pass that was recorded, and results are the same to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import dispatch
from .ops.common import REPEATABLE, bare, on_device, repeatable_cudnn, signature
from .sources import Kept

if TYPE_CHECKING or dispatch.has_triton():
    from .kernels.launch import Launch, seen
    from .kernels.tensors import described, without_memory

Run = Callable[[Tensor], Tensor]
Held = list[Any]  # tensors by slot; the input is in the first

KEPT = 64  # plans of a model: some hundred kB each, of arguments

_ALLOCATE = frozenset(
    f"aten::{name}" for name in ("empty.memory_format", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
)


class Instead(Enum):
    """What is kept in a plan's place."""

    ONCE = "this kind of input came once"
    NEVER = "no plan can do what the pass does"


class Unrepeatable(Exception):
    """A forward pass does what a plan cannot."""


class Plans:
    """Plans of one model by the kind of input; made when a kind comes for the second time."""

    def __init__(self) -> None:
        self._kept: Kept[Plan | Instead] = Kept(KEPT)

    def clear(self) -> None:
        """Forget them."""
        self._kept.clear()

    def __call__(
        self,
        forward: Run,
        x: Tensor,
        tensors: Sequence[Tensor],
        objects: Sequence[object],
        constants: Callable[[], list[Tensor] | None],
    ) -> Tensor:
        """``forward(x)``.

        Args:
            tensors: parameters and buffers that it reads; a change of one counts a version.
            objects: what else it depends on, if another takes its place. Not the model, which would never be let go.
            constants: asked before a plan is made: all memory beside the input's that it may read; None if none may be
                made.
        """
        kept, key = self._kept.made_from(tensors, objects), _signature(x)
        plan = kept.find(key)
        if isinstance(plan, Plan):
            return plan(x)
        if plan is None:
            y = forward(x)  # which compiles kernels and lays out weights
            kept.keep(key, Instead.ONCE)
        elif plan is Instead.NEVER or (known := constants()) is None:
            y = forward(x)
            kept.keep(key, Instead.NEVER)
        else:
            try:
                y, plan = recorded(forward, x, known)
            except Unrepeatable:
                y, plan = forward(x), Instead.NEVER
            kept.keep(key, plan)
        return y


def _signature(x: Tensor) -> Hashable:
    """What a plan depends on beside weights; code is compiled for aligned memory apart."""
    return signature(x), x.data_ptr() % 16, torch.is_inference_mode_enabled(), _cudnn()


class View(NamedTuple):
    """A tensor in a slot's memory, ``offset`` elements behind its start."""

    slot: int
    size: Sequence[Any]
    stride: Sequence[Any]
    offset: Any

    def of(self, held: Held) -> Tensor:
        whole = held[self.slot]
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)


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
        leaves, spec: its arguments, as ``tree_flatten`` has them.
        results: (which, slot) of those that are new memory.
        repeats: whether cuDNN is asked to repeat.
    """

    function: Callable[..., Any]
    leaves: tuple[Any, ...]
    spec: Any
    results: tuple[tuple[int, int], ...]
    repeats: bool

    def __call__(self, held: Held) -> None:
        arguments, options = tree_unflatten([x.of(held) if type(x) is View else x for x in self.leaves], self.spec)
        with repeatable_cudnn() if self.repeats else contextlib.nullcontext():
            found, _ = tree_flatten(self.function(*arguments, **options))
        for i, slot in self.results:
            held[slot] = found[i]


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
    """The steps of a forward pass, and where its result is."""

    steps: tuple[Step, ...]
    slots: int
    result: View

    def __call__(self, x: Tensor) -> Tensor:
        held: Held = [None] * self.slots
        held[0] = x
        with on_device(x):
            for step in self.steps:
                step(held)
        y, (_, size, stride, offset) = held[self.result.slot], self.result
        # No view if it need not be one, which autograd would not let be changed in place.
        return y if (y.shape, y.stride(), 0) == (size, stride, offset) else self.result.of(held)


def recorded(forward: Run, x: Tensor, constants: Sequence[Tensor]) -> tuple[Tensor, Plan]:
    """``forward(x)``, and the plan of it; Unrepeatable for what a plan cannot do.

    Args:
        constants: weights, whose memory it may read.
    """
    recorder = _Recorder(x, constants)
    with bare(), recorder, seen(recorder.launched):
        y = forward(x)
    result = recorder.place(y)
    if result is None:
        raise Unrepeatable("the result is in memory of its own")
    if recorder.made_once and x.is_cuda:
        torch.cuda.synchronize(x.device)  # other streams may be about to read it
    return y, Plan(tuple(_freed(recorder.steps, result.slot)), recorder.slots, result)


class _Slot(NamedTuple):
    """Memory as it was when the slot was filled: elements ``first`` to ``end`` of it."""

    number: int
    memory: StorageWeakRef
    dtype: torch.dtype
    first: Any
    end: Any


class _Recorder(TorchDispatchMode):
    """Writes steps down. A tensor's slot is told by its memory; what is in none must be a constant that is known."""

    def __init__(self, x: Tensor, constants: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.slots = 0
        self.made_once: dict[int, Tensor] = {}  # constants that the pass itself makes, by address
        self._known = {_address(t) for t in constants}
        self._by_address: dict[int, _Slot] = {}
        self._cudnn = _cudnn()
        self._fill_slot(x)

    def _fill_slot(self, x: Tensor) -> int:
        memory, number = StorageWeakRef(x.untyped_storage()), self.slots
        self._by_address[_address(x)] = _Slot(number, memory, x.dtype, x.storage_offset(), _end(x))
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
        return View(slot.number, tuple(x.shape), x.stride(), x.storage_offset() - slot.first)

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
            self._called(func, tree_flatten((args, kwargs or {})), tree_flatten(result)[0])
        return result

    def _called(self, func: torch._ops.OpOverload, arguments: Any, results: list[Any]) -> None:
        given, spec = arguments
        addresses = {_address(t) for t in given if isinstance(t, Tensor)}
        # By memory, for in inference mode ``to`` and ``contiguous`` come whole, which are views at times.
        if _may_be_view(func._schema) and all(isinstance(t, Tensor) and _address(t) in addresses for t in results):
            return
        if not all(isinstance(t, Tensor) for t in results):
            if addresses:
                raise Unrepeatable(f"{func} gives what Python reads")
            return  # of dtypes and the like, which are the same for each input
        changes = func._schema.is_mutable
        if changes and not addresses.isdisjoint(self.made_once):
            raise Unrepeatable(f"{func} changes what is made once")
        leaves = tuple((self.place(t) or t) if isinstance(t, Tensor) else t for t in given)
        of_constants = bool(addresses) and not any(type(leaf) is View for leaf in leaves)
        if of_constants and not changes and torch.Tag.nondeterministic_seeded not in func.tags:
            self.made_once |= {_address(t): t for t in results}
            return
        repeats = _cudnn() != self._cudnn
        if repeats and _cudnn() != REPEATABLE:
            raise Unrepeatable("the pass sets what cuDNN may do")
        new = tuple((i, self._fill_slot(t)) for i, t in enumerate(results) if _address(t) not in addresses)
        self.steps.append(Call(func, leaves, spec, new, repeats))


def _may_be_view(schema: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _cudnn() -> tuple[bool, bool]:
    return torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _end(x: Tensor) -> Any:
    """The element of its memory behind its last one."""
    return x.storage_offset() + 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _freed(steps: list[Step], result: int) -> Iterator[Step]:
    """The steps without memory that nothing reads, each slot let go of behind the last that reads it."""
    last = {result: len(steps)}
    for i, step in enumerate(steps):
        last |= {slot: i for slot in _read(step) if slot != result}
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
        return tuple(x.slot for x in step.leaves if type(x) is View)
    return ()
