"""Copies under way: boxes by TMA, and the few bytes of each lane by cp.async."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import rounded_to_tf32
from .barriers import shared_address
from .memory import Fault
from .translate import Event
from .warp import Warp

if TYPE_CHECKING:
    from .block import Block

ACTORS = 64  # who make copies, in turns


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
    """Those of a block."""

    def __init__(self, block: Block, first_actor: int) -> None:
        self._block, self._first_actor, self._made = block, first_actor, 0
        self.under_way: list[Copy] = []

    def finish(self, copy: Copy) -> None:
        if copy in self.under_way:
            self.under_way.remove(copy)
            copy.do()

    def _begin(self, do: Callable[[int, Any], None], clock: Any) -> Copy:
        self._block.touches_global()
        turn, number = divmod(self._made, ACTORS)
        self._made += 1
        actor = self._first_actor + number
        clock[actor] = turn + 1
        copy = Copy(lambda: do(actor, clock), actor, turn + 1)
        self.under_way.append(copy)
        return copy

    def box(self, warp: Warp, event: Event, kept: Any, stores: Groups) -> None:
        """cp.async.bulk.tensor: one lane's, either way."""
        if kept.sum() != 1:
            raise Fault(f"{kept.sum()} lanes start one copy")
        lane, shared, memory = int(kept.nonzero()[0][0]), self._block.shared, self._block.memory
        loads = "mbarrier::complete_tx::bytes" in event.instruction.parts
        to, source, *_ = event.operands
        (read, offset, coordinates), place = (source, to) if loads else (to, source)
        described = self._block.maps[int(read(warp)[lane]) + offset]
        origin = [int(np.int32(coordinate(warp)[lane])) for coordinate in coordinates][::-1]
        addresses, places, inside = described.places(origin, shared_address(warp, place, kept))
        if not loads:
            if described.rounds:
                raise Fault("a TMA store by a descriptor that rounds what it loads")

            def store(actor: int, clock: Any) -> None:
                memory.store(addresses[inside], shared.load(places, 16, actor, clock)[inside])

            stores.add(self._begin(store, warp.for_units()))
            warp.tick()
            return
        barrier = self._block.barriers.at(warp, event.operands[2], kept)
        known = warp.clock.copy(), warp.fenced.copy()

        def load(actor: int, clock: Any) -> None:
            values = np.zeros((len(places), 16), np.uint8)  # outside the tensor
            values[inside] = memory.load(addresses[inside], 16)
            if described.rounds:
                values = rounded_to_tf32(values.view(np.uint32)).view(np.uint8)
            shared.store(places, values, actor, clock)
            barrier.know(*known)
            barrier.clock[actor] = max(barrier.clock[actor], clock[actor])
            barrier.bytes -= described.bytes
            barrier.changed()

        self._begin(load, warp.for_units())
        warp.tick()

    def by_lanes(self, warp: Warp, event: Event, kept: Any, loads: Groups) -> None:
        """cp.async: each lane its 4, 8 or 16 bytes, or zeros in their place."""
        (to, to_offset, _), (source, source_offset, _), length, *read = event.operands
        places = to(warp)[kept].astype(np.int64) + to_offset
        addresses = source(warp)[kept].astype(np.int64) + source_offset
        lengths = read[0](warp)[kept] if read else np.full(len(places), length)
        if (places % length).any() or not np.isin(lengths, (0, length)).all():
            raise Fault(f"cp.async of {length} bytes that are not aligned, or of parts of them")

        def load(actor: int, clock: Any) -> None:
            values = np.zeros((len(places), length), np.uint8)
            values[lengths > 0] = self._block.memory.load(addresses[lengths > 0], length)
            self._block.shared.store(places, values, actor, clock)

        loads.add(self._begin(load, warp.clock.copy()))
        warp.tick()
