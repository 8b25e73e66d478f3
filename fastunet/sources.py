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


class Kept(Generic[Made]):
    """What was made, by key, for as long as its sources are the same; the least recently used of more goes.

    Args:
        limit: how many are kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._made: OrderedDict[Hashable, tuple[Made, Sources]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: Hashable, tensors: Sequence[Tensor], objects: Sequence[object] = ()) -> Made | None:
        """What was kept under ``key``, made from these; else None."""
        with self._lock:
            made, sources = self._made.get(key, (None, None))
            if made is None or sources is None or not sources.are(tensors, objects):
                return None
            self._made.move_to_end(key)
            return made

    def keep(self, key: Hashable, made: Made, tensors: Sequence[Tensor], objects: Sequence[object] = ()) -> None:
        """Put it there, in place of what was."""
        with self._lock:
            self._made[key] = made, Sources(tensors, objects)
            self._made.move_to_end(key)
            while len(self._made) > self.limit:
                self._made.popitem(last=False)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._made.clear()
