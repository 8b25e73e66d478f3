"""mbarriers, and the barriers of bar.sync: who waits, and what those who pass know of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .memory import Fault, SharedMemory
from .translate import LANES, Event
from .warp import Warp


@dataclass
class Barrier:
    """An mbarrier.

    Attributes:
        count: of arrivals in each phase. due: of those still missing. bytes: that are expected and have not come.
        clock, fenced: of all who have arrived; ``seen``: both, of those before the phase that it is in.
        since: by whom it was initialised, and at which time of theirs.
    """

    count: int
    clock: Any
    fenced: Any
    due: int = 0
    bytes: int = 0
    phase: int = -1
    seen: Any = None
    since: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.changed()

    def know(self, clock: Any, fenced: Any) -> None:
        np.maximum(self.clock, clock, out=self.clock)
        np.maximum(self.fenced, fenced, out=self.fenced)

    def changed(self) -> None:
        """Once nothing is due any more the next phase begins."""
        if self.due < 0:
            raise Fault("more arrivals at an mbarrier than it counts")
        if self.due == 0 and self.bytes == 0:
            self.phase, self.due, self.seen = self.phase + 1, self.count, (self.clock.copy(), self.fenced.copy())


class Barriers:
    """Those of a block."""

    def __init__(self, warps: int, shared: SharedMemory) -> None:
        self._warps, self._shared = warps, shared
        self._mbarriers: dict[int, Barrier] = {}  # by address
        self._waiting: dict[tuple[int, int], list[Warp]] = {}  # by number, and how many are to come

    def at(self, warp: Warp, operand: Any, kept: Any) -> Barrier:
        address = shared_address(warp, operand, kept)
        if address not in self._mbarriers:
            raise Fault(f"no mbarrier was initialised at {address:#x}")
        barrier = self._mbarriers[address]
        actor, time = barrier.since
        if warp.clock[actor] < time:
            raise Fault(f"race: {warp.number} uses an mbarrier that {actor} initialises, and did not wait for it")
        return barrier

    def init(self, warp: Warp, event: Event, kept: Any) -> None:
        address = shared_address(warp, event.operands[0], kept)
        if kept.sum() != 1 or address % 8 or address in self._mbarriers:
            raise Fault(f"an mbarrier at {address:#x} is initialised by {kept.sum()} lanes, or twice")
        since = warp.number, int(warp.clock[warp.number])
        barrier = Barrier(event.operands[1], warp.clock.copy(), warp.fenced.copy(), since=since)
        self._mbarriers[address] = barrier
        self._shared.reserve(address, True, warp.number, warp.clock)
        warp.tick()

    def inval(self, warp: Warp, event: Event, kept: Any) -> None:
        self.at(warp, event.operands[0], kept)
        address = shared_address(warp, event.operands[0], kept)
        del self._mbarriers[address]
        self._shared.reserve(address, False, warp.number, warp.clock)

    def arrive(self, warp: Warp, event: Event, kept: Any) -> None:
        """By each lane, once or a number of times."""
        self._arrive(warp, event, kept, event.operands[2] if len(event.operands) > 2 else 1, 0)

    def expect(self, warp: Warp, event: Event, kept: Any) -> None:
        """By each lane, once, and bytes are expected."""
        self._arrive(warp, event, kept, 1, event.operands[2])

    def _arrive(self, warp: Warp, event: Event, kept: Any, arrivals: int, expected: int) -> None:
        if event.operands[0] != "_":
            raise NotImplementedError(event.instruction.text)
        barrier, lanes = self.at(warp, event.operands[1], kept), int(kept.sum())
        barrier.know(warp.clock, warp.fenced)
        barrier.bytes += lanes * expected
        barrier.due -= lanes * arrivals
        warp.tick()
        barrier.changed()

    def try_wait(self, warp: Warp, event: Event, kept: Any) -> None:
        """For the end of the phase of this parity: not that it is in."""
        barrier, parity = self.at(warp, event.operands[1], kept), event.operands[2]
        parity = parity if isinstance(parity, int) else warp.one(parity(warp))

        def over() -> bool:
            if barrier.phase & 1 == parity:
                return False
            np.maximum(warp.clock, barrier.seen[0], out=warp.clock)
            np.maximum(warp.fenced, barrier.seen[1], out=warp.fenced)
            warp.registers[event.operands[0]] = warp.registers[event.operands[0]] | kept
            return True

        warp.blocked = None if over() else over

    def sync(self, warp: Warp, event: Event, kept: Any) -> None:
        """bar.sync: until so many warps have come, all of the block's if none is told."""
        number, *threads = event.operands
        number = number if isinstance(number, int) else warp.one(number(warp))
        count = threads[0] if threads else LANES * self._warps
        others = (key for key, waiting in self._waiting.items() if waiting and key[0] == number and key[1] != count)
        if not 0 <= number < 16 or count % LANES or next(others, None):
            raise Fault(
                f"barrier {number} is of {count} threads, 0 to 15 of multiples of 32, all the same, are expected"
            )
        waiting = self._waiting.setdefault((number, count), [])
        waiting.append(warp)
        if len(waiting) < count // LANES:
            warp.blocked = lambda: warp not in waiting
            return
        clock, fenced = (np.max([getattr(other, name) for other in waiting], 0) for name in ("clock", "fenced"))
        for other in waiting:
            other.clock[:], other.fenced[:] = clock, fenced
            other.tick()
        waiting.clear()


def shared_address(warp: Warp, operand: Any, kept: Any) -> int:
    """Of an operand in brackets, which all lanes that take part have alike."""
    read, offset, _ = operand
    return warp.one(read(warp), kept) + offset
