"""Whether something that was made from tensors still holds, and a few such things by key."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from torch import Tensor, nn

Made = TypeVar("Made")


class Sources:
    """Tensors and other objects as they are now; what was made from them holds while each is the same, unchanged.

    Writing through ``.data`` counts no version and is not seen. Inference tensors have none at all. Of other objects
    it is seen that they are the same, not that they changed.
    """

    def __init__(self, tensors: Sequence[Tensor], objects: Sequence[object] = ()) -> None:
        # Aliases keep the memory alive, so that a new tensor cannot appear at an old address.
        self._alive = [t.detach() for t in tensors]
        self._seen = [(t.data_ptr(), t._version, t.dtype) for t in tensors]
        self._objects = list(objects)

    def are(self, tensors: Sequence[Tensor], objects: Sequence[object] = ()) -> bool:
        """Whether these are they, and no tensor changed since."""
        if [(t.data_ptr(), t._version, t.dtype) for t in tensors] != self._seen:
            return False
        return len(objects) == len(self._objects) and all(a is b for a, b in zip(objects, self._objects, strict=True))


def parts(network: nn.Module) -> tuple[list[nn.Module], list[Tensor]]:
    """All its modules, itself first, and their parameters and buffers; one that is shared as often as it is used.

    What ``modules()``, ``parameters()`` and ``buffers()`` tell, in a fifth of the time.
    """
    modules = [network]
    for module in modules:  # which grow
        modules += [child for child in module._modules.values() if child is not None]
    held = [kept for module in modules for kept in (module._parameters, module._buffers) if kept]
    return modules, [t for kept in held for t in kept.values() if t is not None]


class Generation(Generic[Made]):
    """What was made of the same sources, by key; the least recently used of more than ``limit`` goes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._made: OrderedDict[Hashable, Made] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: Hashable) -> Made | None:
        with self._lock:
            made = self._made.get(key)
            if made is not None:
                self._made.move_to_end(key)
            return made

    def keep(self, key: Hashable, made: Made) -> None:
        with self._lock:
            self._made[key] = made
            self._made.move_to_end(key)
            while len(self._made) > self._limit:
                self._made.popitem(last=False)


class Kept(Generic[Made]):
    """What was made, for as long as its sources are the same.

    Ask first, make then, and keep it in the generation that was asked: if sources change meanwhile, it goes with that.

    Args:
        limit: how many are kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._now: tuple[Sources, Generation[Made]] | None = None

    def made_from(self, tensors: Sequence[Tensor], objects: Sequence[object] = ()) -> Generation[Made]:
        """What was made of these; all else is forgotten."""
        now = self._now
        if now is None or not now[0].are(tensors, objects):
            now = self._now = Sources(tensors, objects), Generation(self._limit)
        return now[1]

    def clear(self) -> None:
        """Forget all."""
        self._now = None
