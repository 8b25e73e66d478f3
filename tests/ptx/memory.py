"""Memory of a launch: tensors as they lie, a block's shared memory, and the boxes that TMA copies between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Bytes = Any  # an array of uint8
SHARED_BASE = 1024  # where a block's shared memory begins: the first KB is the system's
SWIZZLES = {0: 16, 1: 32, 2: 64, 3: 128}  # bytes, as cuTensorMapEncodeTiled numbers them
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class Fault(AssertionError):
    """What a machine would do wrong of, stop at, or do by luck."""


def swizzled(addresses: Any, mode: int) -> Any:
    """Where in shared memory a byte lies: 16-byte units are exchanged by bits of the address itself."""
    return addresses ^ ((addresses >> 7 & SWIZZLES[mode] // 16 - 1) << 4)


class GlobalMemory:
    """The storages of a launch's tensors at their own addresses; whatever else is touched is a fault."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._storages: dict[int, tuple[int, Bytes]] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            self._storages[storage.data_ptr()] = storage.data_ptr() + len(raw), raw

    def _found(self, addresses: Any, length: int) -> tuple[int, Bytes]:
        first, last = int(addresses.min()), int(addresses.max()) + length
        for start, (end, raw) in self._storages.items():
            if start <= first and last <= end:
                return start, raw
        raise Fault(f"global memory {first:#x} to {last:#x} belongs to no tensor of this launch")

    def load(self, addresses: Any, length: int) -> Bytes:
        """(n, length) bytes from each address on."""
        if not addresses.size:
            return np.empty((0, length), np.uint8)
        if (addresses % length).any():
            raise Fault(f"a load of {length} bytes is not aligned")
        start, raw = self._found(addresses, length)
        return raw[(addresses - start)[:, None] + np.arange(length)]

    def store(self, addresses: Any, values: Bytes) -> None:
        """``values`` (n, length) from each address on."""
        if not addresses.size:
            return
        length = values.shape[1]
        if (addresses % length).any():
            raise Fault(f"a store of {length} bytes is not aligned")
        start, raw = self._found(addresses, length)
        raw[(addresses - start)[:, None] + np.arange(length)] = values


@dataclass(frozen=True)
class TensorMap:
    """What ``cuTensorMapEncodeTiled`` is given for a tensor; axes with the innermost last, as in PyTorch.

    Raises:
        Fault: for what it refuses.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    box: tuple[int, ...]
    itemsize: int
    swizzle: int
    rounds: bool = False  # float32 to tf32, as it is loaded

    def __post_init__(self) -> None:
        inner = self.box[-1] * self.itemsize
        span = SWIZZLES[self.swizzle] if self.swizzle else 256 * self.itemsize
        for right, rule in (
            (self.address % 16 == 0, "an address that divides by 16"),
            (1 <= len(self.shape) <= 5 and len(self.shape) == len(self.box) == len(self.strides), "1 to 5 axes"),
            (all(0 < size <= 2**32 for size in self.shape), "sizes from 1 to 2^32"),
            (self.strides[-1] == self.itemsize, "the innermost axis without gaps"),
            (all(s % 16 == 0 and 0 < s < 2**40 for s in self.strides[:-1]), "strides that divide by 16, below 2^40"),
            (all(0 < size <= 256 for size in self.box), "boxes of at most 256 along each axis"),
            (inner % 16 == 0 and inner <= span, f"boxes of a multiple of 16 and at most {span} bytes inside"),
        ):
            if not right:
                raise Fault(f"TMA wants {rule}: {self}")
        if self.swizzle and inner < span:
            raise NotImplementedError(f"a box narrower than its swizzle: {self}")

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.itemsize

    def places(self, origin: Sequence[int], shared: int) -> tuple[Any, Any, Any]:
        """Of the box at ``origin``: global address, shared address, whether inside, of each 16 bytes."""
        if shared % 128:
            raise Fault(f"a TMA box at {shared:#x} of shared memory, which does not divide by 128")
        unit = 16 // self.itemsize
        axes = [np.arange(first, first + size) for first, size in zip(origin, self.box, strict=True)]
        axes[-1] = axes[-1][::unit]
        index = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")])
        sizes = np.array(self.shape)[:, None]
        inside = ((index >= 0) & (index < sizes)).all(0)
        if (index[-1] % unit).any() or self.shape[-1] % unit:
            raise NotImplementedError(f"a box that begins or ends within 16 bytes: {self}, {origin}")
        addresses = self.address + (index * np.array(self.strides)[:, None]).sum(0)
        return addresses, swizzled(shared + 16 * np.arange(index.shape[1]), self.swizzle), inside


class SharedMemory:
    """A block's bytes, who wrote and who read them last, and at which time of theirs.

    Whoever accesses a byte says at which time of everybody it knows that they have been (a vector clock): what was
    written, or read before it is written over, at a later time is a race, whatever came first in this run; but for
    what is written as it was, as all warps may write one thing. Where an mbarrier lies nobody else reads or writes.
    """

    GRAIN = 2  # bytes that are watched as one

    def __init__(self, size: int, actors: int) -> None:
        self.raw = np.full(SHARED_BASE + size + 15 & ~15, 0xFF, np.uint8)  # NaN in every dtype of floats
        grains = len(self.raw) // self.GRAIN
        self._writer = np.full(grains, -1)
        self._written = np.zeros(grains, np.int64)
        self._read = np.zeros((grains, actors), np.int32)
        self._barriers = np.zeros(grains, np.bool_)

    def _grains(self, addresses: Any, length: int) -> Any:
        if addresses.size and (addresses.min() < SHARED_BASE or addresses.max() + length > len(self.raw)):
            raise Fault(f"shared memory {addresses.min():#x} to {addresses.max() + length:#x} is not the block's")
        if (addresses % length).any():
            raise Fault(f"shared memory of {length} bytes that is not aligned")
        grains = (addresses[:, None] + np.arange(0, length, min(length, self.GRAIN))).ravel() // self.GRAIN
        if self._barriers[grains].any():
            raise Fault("shared memory is touched in which an mbarrier lies")
        return grains

    def reserve(self, address: int, reserved: bool, actor: int, clock: Any) -> None:
        """8 bytes for an mbarrier, or no longer."""
        grains = np.arange(address, address + 8, self.GRAIN) // self.GRAIN
        self._barriers[grains] = False
        self.store(np.array([address]), np.zeros((1, 8), np.uint8), actor, clock)
        self._barriers[grains] = reserved

    def load(self, addresses: Any, length: int, actor: int, clock: Any) -> Bytes:
        """(n, length) bytes from each address on."""
        grains = self._grains(addresses, length)
        writers = self._writer[grains]
        if (writers < 0).any():
            raise Fault("shared memory is read that nobody wrote")
        late = (self._written[grains] > clock[writers]) & (writers != actor)
        if late.any():
            raise Fault(f"race: {actor} reads what {writers[late][0]} writes, and did not wait for it")
        self._read[grains, actor] = clock[actor]
        return self.raw[addresses[:, None] + np.arange(length)]

    def store(self, addresses: Any, values: Bytes, actor: int, clock: Any) -> None:
        """``values`` (n, length) from each address on."""
        grains = self._grains(addresses, values.shape[1])
        writers = self._writer[grains]
        late = (self._written[grains] > clock[writers]) & (writers >= 0) & (writers != actor)
        places = addresses[:, None] + np.arange(values.shape[1])
        if late.any():
            late &= ~(self.raw[places] == values).reshape(len(grains), -1).all(1)
        if late.any():
            raise Fault(f"race: {actor} writes what {writers[late][0]} writes, and did not wait for it")
        readers = self._read[grains] > clock
        readers[:, actor] = False
        if readers.any():
            raise Fault(f"race: {actor} writes what {readers.any(0).nonzero()[0][0]} reads, and did not wait for it")
        self._writer[grains], self._written[grains] = actor, clock[actor]
        self.raw[places] = values
