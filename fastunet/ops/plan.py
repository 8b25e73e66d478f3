"""What a function of tensors makes of them as its launches in a row, without the Python between them.

Checks, choices, descriptors, and Triton's own look at every argument take a host longer than small maps take a GPU
(benchmarks/NOTES.md). They depend on the kind of arguments alone, so they are made once: what the function allocates,
launches and calls of PyTorch is written down (:mod:`fastunet.ops.recorder`), and done again for the next arguments of
that kind (:mod:`fastunet.ops.planned`). Memory is allocated and let go as when it was recorded, and results are the
same to the bit.

A plan is of a single operator (:mod:`fastunet.ops.operator`) or of a whole forward pass (:mod:`fastunet.plan`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from .common import on_device, repeatable_cudnn

if TYPE_CHECKING or dispatch.has_triton():
    from ..kernels.tensors import described

Held = list[Any]  # tensors by slot; the arguments' come first


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
        arguments = [replaced(a, View, lambda view: view.of(held)) for a in self.arguments]
        with repeatable_cudnn() if self.repeats else contextlib.nullcontext():
            found = self.function(*arguments, **self.options)
        if isinstance(found, Tensor):
            found = (found,)
        for i, slot in self.results:
            held[slot] = found[i]


def replaced(argument: Any, of: type[Any], by: Callable[[Any], Any]) -> Any:
    """An operator's argument, or those in its list, by another where it is of the type."""
    if isinstance(argument, of):
        return by(argument)
    return [replaced(a, of, by) for a in argument] if type(argument) in (list, tuple) else argument


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
