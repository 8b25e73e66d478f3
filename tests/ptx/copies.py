"""Copies under way: boxes by TMA, and the few bytes of each lane by cp.async."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import rounded_to_tf32
from .barriers import shared_address
from .memory import Fault, TensorMap
from .translate import Event
from .warp import Warp

if TYPE_CHECKING:
    from .block import Block

ACTORS = 64  # who make TMA's copies, in turns


@dataclass
class Copy:
    """``do`` it, as an actor and at a time of its."""

    do: Callable[[], None]
    actor: int
    time: int


class Groups:
    """A warp's copies, by commit; the last group is not committed yet."""

    def __init__(self, copies: Copies, warp: Warp) -> None:
        self._copies, self._warp = copies, warp
        self._groups: deque[list[Copy]] = deque([[]])

    def add(self, copy: Copy) -> None:
        self._groups[-1].append(copy)

    @property
    def under_way(self) -> bool:
        return any(self._groups)

    def commit(self) -> None:
        self._groups.append([])

    def wait(self, left: int) -> None:
        """Until no more than so many groups are under way."""
        clock = self._warp.clock
        while len(self._groups) - 1 > left:
            for copy in self._groups.popleft():
                self._copies.finish(copy)
                clock[copy.actor] = max(clock[copy.actor], copy.time)


class Copies:
    """Those of a block.

    Args:
        lanes: the first actor of cp.async, of which each warp has one. tma: the first of TMA.
    """

    def __init__(self, block: Block, lanes: int, tma: int) -> None:
        self._block, self._lanes, self._tma, self._made = block, lanes, tma, 0
        self._times = [0] * block.actors
        self.under_way: list[Copy] = []

    def finish(self, copy: Copy) -> None:
        if copy in self.under_way:
            self.under_way.remove(copy)
            copy.do()

    def never_waited_for(self) -> bool:
        """Of the last copies of each actor."""
        known = np.max([warp.clock for warp in self._block.warps], 0)
        return bool(self.under_way) or any(time > known[actor] for actor, time in enumerate(self._times))

    def _begin(self, warp: Warp, do: Callable[[int, Any], None], actor: int, clock: Any) -> Copy:
        self._block.touches_global(warp)
        self._times[actor] += 1
        clock[actor] = self._times[actor]
        copy = Copy(lambda: do(actor, clock), actor, self._times[actor])
        self.under_way.append(copy)
        warp.tick()
        return copy

    def _begin_tma(self, warp: Warp, do: Callable[[int, Any], None]) -> Copy:
        self._made += 1
        return self._begin(warp, do, self._tma + self._made % ACTORS, warp.for_units())

    def _box(self, warp: Warp, kept: Any, tensor: Any, place: Any) -> tuple[TensorMap, Any, Any, Any]:
        """Descriptor, global and shared addresses of each 16 bytes, and which lie inside."""
        if kept.sum() != 1:
            raise Fault(f"{kept.sum()} lanes start one copy")
        lane = int(kept.nonzero()[0][0])
        read, offset, coordinates = tensor
        described = self._block.maps[int(read(warp)[lane]) + offset]
        origin = [int(np.int32(coordinate(warp)[lane])) for coordinate in coordinates][::-1]
        if len(origin) != len(described.shape):
            raise Fault(f"{len(origin)} coordinates of {described}")
        return described, *described.places(origin, shared_address(warp, place, kept))

    def load_box(self, warp: Warp, event: Event, kept: Any) -> None:
        """Which an mbarrier waits for."""
        place, tensor, waits = event.operands
        described, addresses, places, inside = self._box(warp, kept, tensor, place)
        barrier = self._block.barriers.at(warp, waits, kept)

        def load(actor: int, clock: Any) -> None:
            values = np.zeros((len(places), 16), np.uint8)  # outside the tensor
            values[inside] = self._block.memory.load(addresses[inside], 16)
            if described.rounds:
                values = rounded_to_tf32(values.view(np.uint32)).view(np.uint8)
            self._block.shared.store(places, values, actor, clock)
            barrier.clock[actor] = max(barrier.clock[actor], clock[actor])
            barrier.bytes -= described.bytes
            barrier.changed()

        self._begin_tma(warp, load)

    def store_box(self, warp: Warp, event: Event, kept: Any, stores: Groups) -> None:
        tensor, place = event.operands
        described, addresses, places, inside = self._box(warp, kept, tensor, place)
        if described.rounds:
            raise Fault("a TMA store by a descriptor that rounds what it loads")

        def store(actor: int, clock: Any) -> None:
            values = self._block.shared.load(places, 16, actor, clock)
            self._block.memory.store(addresses[inside], values[inside])

        stores.add(self._begin_tma(warp, store))

    def by_lanes(self, warp: Warp, event: Event, kept: Any, loads: Groups) -> None:
        """cp.async: each lane its 4, 8 or 16 bytes, or zeros in their place."""
        (to, to_offset, _), (source, source_offset, _), length, *read = event.operands
        places = to(warp)[kept].astype(np.int64) + to_offset
        addresses = source(warp)[kept].astype(np.int64) + source_offset
        lengths = read[0](warp)[kept] if read else np.full(len(places), length)
        if not np.isin(lengths, (0, length)).all():
            raise NotImplementedError(f"cp.async of parts of {length} bytes: {lengths}")

        def load(actor: int, clock: Any) -> None:
            values = np.zeros((len(places), length), np.uint8)
            values[lengths > 0] = self._block.memory.load(addresses[lengths > 0], length)
            self._block.shared.store(places, values, actor, clock)

        loads.add(self._begin(warp, load, self._lanes + warp.number, warp.clock.copy()))
