"""A forward pass as its launches in a row, without the Python between them.

Checks, choices, descriptors, and Triton's own look at every argument take a host longer than small maps take a GPU
(benchmarks/NOTES.md). They depend on the kind of input and on the weights alone, so they are made once: what a forward
pass allocates, launches and calls of PyTorch is written down, and done again for the next input of that kind. Memory is
allocated and let go as in the pass that was recorded, and results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import dispatch, ops
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


ONCE, NONE = "came once", "cannot be"  # in a plan's place


class Unrepeatable(Exception):
    """A forward pass does what a plan cannot."""


class Plans:
    """Plans of one model by the kind of input; made when a kind comes for the second time."""

    def __init__(self) -> None:
        self._kept: Kept[Plan | str] = Kept(KEPT)

    def clear(self) -> None:
        """Forget them."""
        self._kept.clear()

    def __call__(
        self,
        forward: Run,
        x: Tensor,
        tensors: Sequence[Tensor],
        objects: Sequence[object],
        *,
        suits: Callable[[], bool],
    ) -> Tensor:
        """``forward(x)``.

        Args:
            tensors: parameters and buffers that it reads; a change of one counts a version.
            objects: what else it depends on, if another takes its place. Not the model, which would never be let go.
            suits: asked before a plan is made, whether one may be.
        """
        key, given = _signature(x), (tensors, objects)
        plan = self._kept.find(key, *given)
        if isinstance(plan, Plan):
            return plan(x)
        if plan == ONCE and suits():
            try:
                y, plan = recorded(forward, x)
            except Unrepeatable:
                y, plan = forward(x), NONE
        else:  # the first time it compiles kernels and lays out weights, which are not to be recorded
            y, plan = forward(x), NONE if plan else ONCE
        self._kept.keep(key, plan, *given)
        return y


def _signature(x: Tensor) -> Hashable:
    """What a plan depends on beside weights; code is compiled for aligned memory apart."""
    return ops.signature(x), x.data_ptr() % 16, torch.is_inference_mode_enabled()


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
        leaves, spec: its arguments, as ``tree_flatten`` has them. kept: (result, slot) of those that are new memory.
    """

    function: Callable[..., Any]
    leaves: tuple[Any, ...]
    spec: Any
    kept: tuple[tuple[int, int], ...]

    def __call__(self, held: Held) -> None:
        arguments, options = tree_unflatten([x.of(held) if type(x) is View else x for x in self.leaves], self.spec)
        found, _ = tree_flatten(self.function(*arguments, **options))
        for i, slot in self.kept:
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
        with ops.on_device(x):
            for step in self.steps:
                step(held)
        y = held[self.result.slot]
        # No view if it need not be one, which autograd would not let be changed in place.
        return y if (y.shape, y.stride()) == (self.result.size, self.result.stride) else self.result.of(held)


def recorded(forward: Run, x: Tensor) -> tuple[Tensor, Plan]:
    """``forward(x)``, and the plan of it; Unrepeatable for what a plan cannot do."""
    recorder = _Recorder(x)
    with ops.bare(), recorder, seen(recorder.launched):
        y = forward(x)
    result = recorder.place(y)
    if result is None:
        raise Unrepeatable("the result is in memory of its own")
    return y, Plan(tuple(_freed(recorder.steps, result.slot)), recorder.slots, result)


class _Recorder(TorchDispatchMode):
    """Writes steps down. A tensor's slot is told by its memory; what is in no slot, as weights are, is a constant."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.slots = 0
        self._whole: dict[int, tuple[int, torch.dtype, Any]] = {}  # slot, dtype, first element, by address
        self._made: dict[int, Tensor] = {}  # constants that the pass itself makes, by address, kept from being let go
        self._new_slot(x)

    def _new_slot(self, x: Tensor) -> int:
        # An address may have been another slot's, whose memory was let go.
        self._whole[_address(x)] = self.slots, x.dtype, x.storage_offset()
        self.slots += 1
        return self.slots - 1

    def place(self, x: Tensor) -> View | None:
        """Where in the slots' memory ``x`` is; None for a constant."""
        found = self._whole.get(_address(x))
        if found is None or not x.numel():
            return None
        slot, dtype, first = found
        if x.dtype != dtype:
            raise Unrepeatable(f"memory of {dtype} taken for {x.dtype}")
        return View(slot, tuple(x.shape), x.stride(), x.storage_offset() - first)

    def _made_once(self, constants: list[Tensor]) -> list[Tensor]:
        for t in constants:
            self._whole.pop(_address(t), None)
            self._made[_address(t)] = t
        return constants

    def launched(self, launch: Launch) -> None:
        moving = []
        for i, argument in enumerate(launch.arguments):
            descriptor = None if isinstance(argument, Tensor) or not hasattr(argument, "block_shape") else argument
            x = argument if descriptor is None else descriptor.base
            view = self.place(x) if isinstance(x, Tensor) else None
            if view is not None:
                template = None if descriptor is None else without_memory(descriptor)
                moving.append((i, view.slot, view if view.offset else None, template))
        fixed = list(launch.arguments)
        for i, *_ in moving:  # not to hold what is replaced
            fixed[i] = None
        self.steps.append(Again(launch.again, tuple(fixed), tuple(moving)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        if f"{schema.name}.{schema.overload_name}".rstrip(".") in _ALLOCATE:
            options = {"dtype": result.dtype, "device": result.device}
            self.steps.append(Allocate(self._new_slot(result), tuple(result.shape), result.stride(), options))
            return result
        if schema.name == "aten::lift_fresh":  # of memory whose allocation nobody saw
            return self._made_once([result])[0]
        if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):  # a view
            return result
        given, spec = tree_flatten((args, kwargs))
        leaves = tuple((self.place(t) or t) if isinstance(t, Tensor) else t for t in given)
        found, _ = tree_flatten(result)
        theirs = {_address(t) for t in given if isinstance(t, Tensor)}
        if not all(isinstance(t, Tensor) for t in found):
            if theirs:
                raise Unrepeatable(f"{func} gives what Python reads")
            return result  # of dtypes and the like
        if schema.is_mutable and not theirs.isdisjoint(self._made):
            raise Unrepeatable(f"{func} changes what is made once")
        fixed = not (schema.is_mutable or any(type(leaf) is View for leaf in leaves))
        if theirs and fixed and torch.Tag.nondeterministic_seeded not in func.tags:  # of weights alone
            self._made_once(found)
            return result
        kept = tuple((i, self._new_slot(t)) for i, t in enumerate(found) if _address(t) not in theirs)
        self.steps.append(Call(func, leaves, spec, kept))
        return result


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _freed(steps: list[Step], result: int) -> Iterator[Step]:
    """The steps without memory that nothing reads, each slot let go of behind the last that reads it."""
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        for slot in _read(step):
            last[slot] = i
    for i, step in enumerate(steps):
        if isinstance(step, Allocate) and step.slot not in last:
            continue
        yield step
        done = tuple(slot for slot in _read(step) if last[slot] == i and slot != result)
        if done:
            yield Free(tuple(dict.fromkeys(done)))


def _read(step: Step) -> tuple[int, ...]:
    if isinstance(step, Again):
        return tuple(slot for _, slot, _, _ in step.moving)
    if isinstance(step, Call):
        return tuple(x.slot for x in step.leaves if type(x) is View)
    return ()
