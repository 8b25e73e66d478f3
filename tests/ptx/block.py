"""A block of warps that runs a translated program, and the units beside them: copies, products, barriers.

The order in which warps go on and copies and products are done is drawn. What the program does not order itself is
found by vector clocks (memory.py), whatever order was drawn: races in shared memory, ordinary stores that no fence lets
TMA and WGMMA see (nor may TMA overwrite what was read before one), mbarriers used before they are, copies that nobody
waits for, registers touched while a product has them. Deadlocks, and what a wrong value leads to, are found as they
come. Source of what instructions mean: NVIDIA's PTX ISA 8.7.

Not modelled: the order of a warp's lanes, which may not go different ways; clusters; races in global memory; time;
that WGMMA might want a fence before it reads what cp.async wrote, which Triton 3.6 leaves out.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from .barriers import Barriers
from .copies import ACTORS, Copies, Copy, Groups
from .memory import UNSIGNED, Fault, GlobalMemory, SharedMemory, TensorMap
from .products import Product, Products
from .translate import LANES, Event, Piece, Translation
from .warp import Warp

_REGISTERS = 65536  # of a multiprocessor
_SHARED_MEMORY = 227 * 1024  # bytes that a block may have
# Events in which some lanes of a warp may take part; a branch says itself that they may not.
_OF_LANES = {
    "bra", "ret", "mbarrier.init", "mbarrier.inval", "mbarrier.arrive", "mbarrier.expect", "mbarrier.try_wait",
    "tma.load", "tma.store", "cp.async",
}  # fmt: skip


class Block:
    """
    Args:
        registers: a thread's, at entry. shared: bytes.
        dependent: whether the launch may begin before the one before it has ended (``launch_pdl``).
        maps: TMA descriptors by the addresses of their parameters.
        index, grid: of the block, and of how many there are, (x, y, z).
        seed: of the order of events, and of what uninitialised registers hold.
    """

    def __init__(
        self,
        translation: Translation,
        *,
        threads: int,
        registers: int,
        shared: int,
        dependent: bool,
        memory: GlobalMemory,
        maps: dict[int, TensorMap],
        index: tuple[int, ...],
        grid: tuple[int, ...],
        seed: int,
    ) -> None:
        self.translation, self.memory, self.maps, self.index, self.grid = translation, memory, maps, index, grid
        self._random, self._noise = random.Random(seed), np.random.default_rng(seed)
        # Warps, each one's cp.async, each one's products, TMA's copies.
        count = threads // LANES
        self.actors = 3 * count + ACTORS
        self._free = _REGISTERS - threads * registers
        if shared > _SHARED_MEMORY or self._free < 0:
            raise Fault(f"{shared} bytes of shared memory or {threads} threads of {registers} registers: too many")
        self.shared = SharedMemory(shared, self.actors)
        self.barriers = Barriers(count, self.shared)
        self.warps = [Warp(self, number) for number in range(count)]
        self.copies = Copies(self, count, 3 * count)
        logs: list[list[Any]] = [[] for _ in range(0, count, 4)]
        self._products = [
            Products(warp, 2 * count + warp.number, self.shared, logs[warp.number // 4]) for warp in self.warps
        ]
        self._loads, self._stores = ([Groups(self.copies, warp) for warp in self.warps] for _ in range(2))
        self._held = [registers] * count  # registers a thread, of each warp
        self._dependent = dependent
        self._waited: list[tuple[int, int]] = []  # for the launch before: warps, and when
        self._handlers = self._make_handlers()

    def garbage(self, width: int) -> Any:
        if width == 1:
            return self._noise.integers(0, 2, LANES).astype(np.bool_)
        return self._noise.integers(0, 1 << (width - 1), LANES).astype(UNSIGNED[width])

    def touches_global(self, warp: Warp) -> None:
        if self._dependent and not any(warp.clock[other] >= time for other, time in self._waited):
            raise Fault("global memory is touched before griddepcontrol.wait")

    def run(self) -> None:
        """Until all warps are done and nothing is under way.

        Raises:
            Fault: of what a GPU would do wrong, or right by luck alone.
        """
        while True:
            ready: list[Warp | Copy | Product] = [warp for warp in self.warps if self._may_go(warp)]
            ready += self.copies.under_way
            ready += [product for products in self._products if (product := products.next()) is not None]
            if not ready:
                break
            chosen = self._random.choice(ready)
            if isinstance(chosen, Warp):
                self._advance(chosen)
            elif isinstance(chosen, Copy):
                self.copies.finish(chosen)
            else:
                self._products[chosen.warp.number].do(chosen)
        waiting = {warp.number: self.translation.steps[warp.step - 1] for warp in self.warps if not warp.done}
        if waiting:
            where = {n: step.instruction.text for n, step in waiting.items() if isinstance(step, Event)}
            raise Fault(f"deadlock: {where}")
        if self.copies.never_waited_for() or any(group.under_way for group in self._stores + self._loads):
            raise Fault("a block ends with copies that nobody waited for")
        for first in range(0, len(self.warps), 4):
            if len({products.issued for products in self._products[first : first + 4]}) > 1:
                raise Fault("a warp of a group issues fewer products than the others")

    def _may_go(self, warp: Warp) -> bool:
        if warp.blocked is not None and warp.blocked():
            warp.blocked = None
        return warp.blocked is None and not warp.done

    def _advance(self, warp: Warp) -> None:
        while not warp.done and warp.blocked is None:
            step = self.translation.steps[warp.step]
            warp.step += 1
            if isinstance(step, Piece):
                if not warp.in_flight.isdisjoint(step.registers):
                    raise Fault("registers are touched that a product under way reads or writes")
                warp.unfenced |= step.computed
                step.run(warp)
                continue
            kept = step.guard(warp)
            if kept.any():
                if not kept.all() and step.name not in _OF_LANES:
                    raise Fault(f"not all lanes of a warp take part in {step.instruction.text}")
                self._handlers[step.name](warp, step, kept)
            if self._random.random() < 0.3:
                return

    def _make_handlers(self) -> dict[str, Callable[[Warp, Event, Any], None]]:
        """By the names of events (translate.py): what becomes of one whose guard holds in some lanes."""
        barriers, copies = self.barriers, self.copies
        products, loads, stores = (
            lambda warp: self._products[warp.number], lambda warp: self._loads[warp.number],
            lambda warp: self._stores[warp.number],
        )  # fmt: skip
        return {
            "bra": self._branch,
            "brx": self._branch_of_table,
            "ret": self._return,
            "bar.warp": lambda warp, event, kept: None,
            "bar": barriers.sync,
            "mbarrier.init": barriers.init,
            "mbarrier.inval": barriers.inval,
            "mbarrier.arrive": barriers.arrive,
            "mbarrier.expect": barriers.expect,
            "mbarrier.try_wait": barriers.try_wait,
            "fence": self._fence,
            "griddepcontrol.launch_dependents": lambda warp, event, kept: None,
            "griddepcontrol.wait": self._wait_for_launch,
            "setmaxnreg": self._set_registers,
            "wgmma.fence": lambda warp, event, kept: warp.unfenced.clear(),
            "wgmma.mma_async": lambda warp, event, kept: products(warp).issue(event),
            "wgmma.commit": lambda warp, event, kept: products(warp).commit(),
            "wgmma.wait": lambda warp, event, kept: products(warp).wait(event.operands[0]),
            "tma.load": copies.load_box,
            "tma.store": lambda warp, event, kept: copies.store_box(warp, event, kept, stores(warp)),
            "tma.commit": lambda warp, event, kept: stores(warp).commit(),
            "tma.wait": lambda warp, event, kept: stores(warp).wait(event.operands[0]),
            "cp.async": lambda warp, event, kept: copies.by_lanes(warp, event, kept, loads(warp)),
            "cp.async.commit": lambda warp, event, kept: loads(warp).commit(),
            "cp.async.wait": lambda warp, event, kept: loads(warp).wait(event.operands[0]),
        }

    def _branch(self, warp: Warp, event: Event, kept: Any) -> None:
        warp.one(kept)
        warp.step = self.translation.labels[event.operands[0]]

    def _branch_of_table(self, warp: Warp, event: Event, kept: Any) -> None:
        index, table = event.operands
        warp.step = self.translation.labels[self.translation.tables[table][warp.one(index(warp))]]

    def _return(self, warp: Warp, event: Event, kept: Any) -> None:
        warp.done = bool(warp.one(kept))

    def _fence(self, warp: Warp, event: Event, kept: Any) -> None:
        """Of what it wrote, and of what others wrote before a barrier that it has passed."""
        warp.fenced[: len(self.warps)] = warp.clock[: len(self.warps)]
        warp.tick()

    def _wait_for_launch(self, warp: Warp, event: Event, kept: Any) -> None:
        self._waited.append((warp.number, int(warp.clock[warp.number])))
        warp.tick()

    def _set_registers(self, warp: Warp, event: Event, kept: Any) -> None:
        """More are waited for until others have given some back."""
        count, direction = event.operands[0], event.instruction.parts[1]
        more = LANES * (count - self._held[warp.number])
        if more and (more > 0) != (direction == "inc") or count % 8 or not 24 <= count <= 256:
            raise Fault(f"setmaxnreg.{direction} from {self._held[warp.number]} to {count}")

        def taken() -> bool:
            if more > self._free:
                return False
            self._free -= more
            self._held[warp.number] = count
            return True

        warp.blocked = None if taken() else taken
