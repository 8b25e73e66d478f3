"""A block of warps that runs a translated program, and the units beside them: copies, products, barriers.

The order in which warps go on and copies and products are done is drawn; what the program does not order itself is
found by vector clocks (memory.py), whatever order was drawn. Source of what instructions mean: NVIDIA's PTX ISA 8.7,
chapters on wgmma, cp.async.bulk.tensor, mbarrier and the memory consistency model.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arithmetic import from_bits, rounded_to_tf32
from .memory import Fault, GlobalMemory, SharedMemory, TensorMap, swizzled
from .translate import LANES, Event, Piece, Translation

_COPIES = 64  # clocks for copies under way, used in turns
_REGISTERS = 65536  # of a multiprocessor
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclass
class Barrier:
    """An mbarrier: arrivals that are due, bytes that are, and which phase it is in."""

    count: int
    clock: Any
    fenced: Any
    due: int = 0
    bytes: int = 0
    phase: int = 0
    seen: Any = None  # clocks of the phase before

    def __post_init__(self) -> None:
        self.due, self.seen = self.count, (self.clock.copy(), self.fenced.copy())

    def changed(self) -> None:
        if self.due < 0:
            raise Fault("more arrivals at an mbarrier than it counts")
        if self.due == 0 and self.bytes == 0:
            self.phase, self.due, self.seen = self.phase + 1, self.count, (self.clock.copy(), self.fenced.copy())


@dataclass
class Named:
    """bar.sync's barriers: who waits."""

    waiting: list[Warp] = field(default_factory=list)


@dataclass
class Copy:
    """A box under way."""

    do: Callable[[], None]
    slot: int
    time: int
    done: bool = False


@dataclass
class Product:
    """One wgmma of one warp: 16 rows of 64."""

    kind: str
    targets: list[int]
    a: int
    b: int
    n: int
    k: int
    accumulate: bool
    majors: tuple[int, ...]
    clock: Any
    done: bool = False


class Warp:
    """32 lanes in step."""

    def __init__(self, block: Block, number: int) -> None:
        self.block, self.number, self.step = block, number, 0
        self.products_actor = block.warps_count + number
        lanes = np.arange(LANES, dtype=np.uint32)
        self.all_lanes, self.first_lane = np.ones(LANES, np.bool_), lanes == 0
        thread = lanes + np.uint32(LANES * number)
        whole = lambda value: np.full(LANES, value, np.uint32)
        self.special = {
            "%tid.x": thread, "%tid.y": whole(0), "%tid.z": whole(0), "%laneid": lanes, "%warpid": whole(number),
            "%ntid.x": whole(LANES * block.warps_count),
        } | {f"%ctaid.{axis}": whole(i) for axis, i in zip("xyz", block.index, strict=True)} | {
            f"%nctaid.{axis}": whole(i) for axis, i in zip("xyz", block.grid, strict=True)
        }  # fmt: skip
        # What nobody wrote is anything.
        self.registers = [block.garbage(width) for width in block.translation.widths]
        self.groups: deque[list[Product]] = deque([[]])  # of products under way, the last not yet committed
        self.products_time = 1
        self.in_flight: set[int] = set()
        self.stores: deque[list[Copy]] = deque([[]])  # groups of copies, the last not yet committed
        self.loads: deque[list[Copy]] = deque([[]])  # likewise, of those that each lane makes
        self.done = False
        self.blocked: Callable[[], bool] | None = None
        self.held = block.registers_at_entry

    # Time

    @property
    def clock(self) -> Any:
        return self.block.clocks[self.number]

    @property
    def fenced(self) -> Any:
        """Up to which time of each warp its ordinary stores are seen by copies and products."""
        return self.block.fenced[self.number]

    def tick(self) -> None:
        self.clock[self.number] += 1

    def async_clock(self) -> Any:
        """What this warp knows, as copies and products see it: of ordinary stores what was fenced."""
        clock = self.clock.copy()
        clock[: self.block.warps_count] = self.fenced[: self.block.warps_count]
        return clock

    # Memory

    def load(self, space: str, address: Any, offset: int, bits: int, old: list[Any], kept: Any) -> list[Any]:
        length = len(old) * bits // 8
        addresses = address[kept].astype(np.int64) + offset
        if space == "global":
            self.block.touches_global()
            raw = self.block.memory.load(addresses, length)
        else:
            raw = self.block.shared.load(addresses, length, self.number, self.clock)
        found = np.ascontiguousarray(raw).view(_UNSIGNED[bits])
        result = []
        for i, register in enumerate(old):
            register = register.copy()
            register[kept] = found[:, i]
            result.append(register)
        return result

    def store(self, space: str, address: Any, offset: int, bits: int, values: list[Any], kept: Any) -> None:
        addresses = address[kept].astype(np.int64) + offset
        kind = _UNSIGNED[bits]
        raw = np.stack([value[kept].astype(kind) for value in values], 1).view(np.uint8)
        if space == "global":
            self.block.touches_global()
            self.block.memory.store(addresses, raw)
        else:
            self.block.shared.store(addresses, raw, self.number, self.clock)

    def store_matrix(self, address: Any, offset: int, values: list[Any], transposed: bool) -> None:
        """stmatrix: 8 x 8 elements of 16 bits each, whose rows lie where the lanes 8i to 8i + 7 say."""
        for i, value in enumerate(values):
            matrix = np.ascontiguousarray(value).view(np.uint16).reshape(8, 8)  # [lane // 4, 2 * (lane % 4) + half]
            rows = np.ascontiguousarray(matrix.T if transposed else matrix).view(np.uint8)
            addresses = address[8 * i : 8 * i + 8].astype(np.int64) + offset
            if (addresses % 16).any():
                raise Fault("a row of stmatrix does not divide by 16 bytes")
            self.block.shared.store(addresses, rows, self.number, self.clock)

    def load_matrix(self, address: Any, offset: int, count: int, transposed: bool) -> list[Any]:
        result = []
        for i in range(count):
            addresses = address[8 * i : 8 * i + 8].astype(np.int64) + offset
            rows = self.block.shared.load(addresses, 16, self.number, self.clock)
            matrix = np.ascontiguousarray(rows).view(np.uint16)
            matrix = np.ascontiguousarray(matrix.T if transposed else matrix)
            result.append(matrix.reshape(LANES, 2).view(np.uint32)[:, 0])
        return result

    # Registers

    def shuffle(self, mode: str, x: Any, other: Any, segment: Any) -> Any:
        lanes = np.arange(LANES)
        if mode == "bfly":
            source = lanes ^ other.astype(np.int64)
        elif mode == "idx":
            source = other.astype(np.int64)
        else:
            raise NotImplementedError(f"shfl.{mode}")
        if (segment != 31).any():
            raise NotImplementedError("shfl within parts of a warp")
        return x[source]

    def unpacked(self, x: Any, parts: int) -> list[Any]:
        bits = 8 * x.itemsize // parts
        pieces = np.ascontiguousarray(x).view(_UNSIGNED[bits]).reshape(LANES, parts)
        return list(np.ascontiguousarray(pieces.T))

    def packed(self, parts: list[Any]) -> Any:
        bits = 8 * parts[0].itemsize * len(parts)
        return np.ascontiguousarray(np.stack(parts, 1)).view(_UNSIGNED[bits])[:, 0]

    def one(self, x: Any, kept: Any = None) -> int:
        """What all lanes that take part have alike."""
        values = x if kept is None else x[kept]
        if (values != values[0]).any():
            raise Fault(f"lanes of a warp differ where they must not: {values}")
        return int(values[0])


class Block:
    """Warps, their shared memory and barriers.

    Args:
        maps: TMA descriptors by the addresses of their parameters.
        seed: of the order of events.
    """

    def __init__(
        self,
        translation: Translation,
        tables: dict[str, list[str]],
        *,
        threads: int,
        registers_at_entry: int,
        shared: int,
        memory: GlobalMemory,
        maps: dict[int, TensorMap],
        index: tuple[int, int, int],
        grid: tuple[int, int, int],
        seed: int,
    ) -> None:
        self.translation, self.memory, self.maps, self.index, self.grid = translation, memory, maps, index, grid
        self.tables = tables
        self.random, self.registers_at_entry = random.Random(seed), registers_at_entry
        self.noise = np.random.default_rng(seed)
        self.warps_count = threads // LANES
        actors = 2 * self.warps_count + _COPIES
        self.shared = SharedMemory(shared, actors)
        self.clocks = np.zeros((actors, actors), np.int64)
        np.fill_diagonal(self.clocks, 1)
        self.fenced = np.zeros((self.warps_count, actors), np.int64)
        self.barriers: dict[int, Barrier] = {}
        self.named: dict[int, Named] = {}
        self.copies: list[Copy] = []
        self.copies_made = 0
        self.free_registers = _REGISTERS - threads * registers_at_entry
        self.waits_for_launch = any(
            isinstance(step, Event) and step.instruction.parts[:2] == ("griddepcontrol", "wait")
            for step in translation.steps
        )
        self.warps = [Warp(self, number) for number in range(self.warps_count)]

    def garbage(self, width: int) -> Any:
        if width == 1:
            return self.noise.integers(0, 2, LANES).astype(np.bool_)
        return self.noise.integers(0, 1 << (width - 1), LANES).astype(_UNSIGNED[width])

    def touches_global(self) -> None:
        if self.waits_for_launch:
            raise Fault("global memory is touched before griddepcontrol.wait")

    # Running

    def run(self) -> None:
        while True:
            ready: list[Any] = [warp for warp in self.warps if not warp.done and self._may_go(warp)]
            ready += self.copies
            products = ((warp, product) for warp in self.warps for group in warp.groups for product in group)
            ready += [(warp, product) for warp, product in products if not product.done][:1]
            if not ready:
                break
            chosen = self.random.choice(ready)
            if isinstance(chosen, Warp):
                self._advance(chosen)
            elif isinstance(chosen, Copy):
                self._finish(chosen)
            else:
                self._multiply(*chosen)
        stuck = [warp for warp in self.warps if not warp.done]
        if stuck:
            where = {warp.number: self.translation.steps[warp.step].instruction.text for warp in stuck}  # type: ignore[union-attr]
            raise Fault(f"deadlock: {where}")

    def _may_go(self, warp: Warp) -> bool:
        if warp.blocked is not None and warp.blocked():
            warp.blocked = None
        return warp.blocked is None

    def _advance(self, warp: Warp) -> None:
        while not warp.done and warp.blocked is None:
            step = self.translation.steps[warp.step]
            if isinstance(step, Piece):
                if warp.in_flight and not warp.in_flight.isdisjoint(step.registers):
                    raise Fault("registers are touched that a product under way reads or writes")
                step.run(warp)
                warp.step += 1
                continue
            warp.step += 1
            self._event(warp, step)
            if self.random.random() < 0.3:
                return

    def _finish(self, copy: Copy) -> None:
        if not copy.done:
            copy.do()
            copy.done = True
            self.copies.remove(copy)

    # Events

    def _event(self, warp: Warp, event: Event) -> None:
        parts = event.instruction.parts
        name = "_".join(part.replace("::", "_") for part in parts[:2])
        kept = event.guard(warp)
        if parts[0] == "bra":
            if warp.one(kept):
                warp.step = self._target(event.operands[0])
        elif parts[0] == "brx":
            table = event.operands[1]
            warp.step = self._target(self.tables[table][warp.one(event.operands[0](warp))])
        elif parts[0] in ("ret", "exit"):
            warp.done = bool(warp.one(kept))
        elif event.instruction.opcode.startswith("bar.warp"):
            pass
        elif parts[0] in ("bar", "barrier"):
            self._wait_for_all(warp, event.operands)
        elif parts[0] == "griddepcontrol":
            self.waits_for_launch = self.waits_for_launch and parts[1] != "wait"
        elif parts[0] == "fence":
            # Of what it wrote, and of what others wrote before a barrier that it has passed.
            warp.fenced[: self.warps_count] = warp.clock[: self.warps_count]
            warp.tick()
        elif parts[0] == "setmaxnreg":
            self._registers(warp, parts[1], event.operands[0])
        elif parts[0] == "mbarrier":
            if kept.any():
                getattr(self, f"_{name}")(warp, event, kept)
        elif parts[0] == "wgmma":
            getattr(self, f"_{name}")(warp, event)
        elif event.instruction.opcode.startswith("cp.async.bulk.tensor"):
            if kept.any():
                self._copy(warp, event, kept)
        elif event.instruction.opcode in ("cp.async.ca.shared.global", "cp.async.cg.shared.global"):
            self._copy_by_lanes(warp, event, kept)
        elif event.instruction.opcode == "cp.async.commit_group":
            warp.loads.append([])
        elif event.instruction.opcode == "cp.async.wait_group":
            self._wait_for_copies(warp, warp.loads, event.operands[0])
        elif event.instruction.opcode == "cp.async.bulk.commit_group":
            warp.stores.append([])
        elif event.instruction.opcode.startswith("cp.async.bulk.wait_group"):
            # Groups are a thread's own, and one lane makes the copies.
            self._wait_for_copies(warp, warp.stores, event.operands[0])
        else:
            raise NotImplementedError(event.instruction.text)

    def _target(self, label: str) -> int:
        return self.translation.labels[label]

    def _wait_for_all(self, warp: Warp, operands: Sequence[Any]) -> None:
        number = operands[0] if isinstance(operands[0], int) else warp.one(operands[0](warp))
        count = operands[1] // LANES if len(operands) > 1 else self.warps_count
        barrier = self.named.setdefault(number, Named())
        barrier.waiting.append(warp)
        if len(barrier.waiting) < count:
            warp.blocked = lambda: warp not in barrier.waiting
            return
        clock = np.max([other.clock for other in barrier.waiting], 0)
        fenced = np.max([other.fenced for other in barrier.waiting], 0)
        for other in barrier.waiting:
            other.clock[:], other.fenced[:] = clock, fenced
            other.tick()
        barrier.waiting = []

    def _registers(self, warp: Warp, direction: str, count: int) -> None:
        """Registers a thread; more are waited for until others have given some back."""
        more = LANES * (count - warp.held)
        if (direction == "inc") != (more > 0) and more:
            raise Fault(f"setmaxnreg.{direction} from {warp.held} to {count}")

        def taken() -> bool:
            if more > self.free_registers:
                return False
            self.free_registers -= more
            warp.held = count
            return True

        if not taken():
            warp.blocked = taken

    # Barriers

    def _barrier(self, warp: Warp, event: Event, which: int, kept: Any) -> Barrier:
        address = self._shared_address(warp, event.operands[which], kept)
        if address not in self.barriers:
            raise Fault(f"no mbarrier was initialised at {address:#x}")
        return self.barriers[address]

    def _shared_address(self, warp: Warp, operand: Any, kept: Any) -> int:
        read, offset, _ = operand
        return warp.one(read(warp), kept) + offset

    def _mbarrier_init(self, warp: Warp, event: Event, kept: Any) -> None:
        address = self._shared_address(warp, event.operands[0], kept)
        if kept.sum() != 1 or address % 8 or address in self.barriers:
            raise Fault(f"an mbarrier at {address:#x} is initialised wrongly, or twice")
        self.barriers[address] = Barrier(event.operands[1], warp.clock.copy(), warp.fenced.copy())
        warp.tick()

    def _mbarrier_inval(self, warp: Warp, event: Event, kept: Any) -> None:
        del self.barriers[self._shared_address(warp, event.operands[0], kept)]

    def _mbarrier_arrive(self, warp: Warp, event: Event, kept: Any) -> None:
        barrier = self._barrier(warp, event, 1, kept)
        extra = event.operands[2] if len(event.operands) > 2 else 0
        lanes = int(kept.sum())
        if "expect_tx" in event.instruction.parts:
            barrier.bytes += lanes * extra
            extra = 0
        np.maximum(barrier.clock, warp.clock, out=barrier.clock)
        np.maximum(barrier.fenced, warp.fenced, out=barrier.fenced)
        barrier.due -= lanes * (extra or 1)
        warp.tick()
        barrier.changed()

    def _mbarrier_try_wait(self, warp: Warp, event: Event, kept: Any) -> None:
        barrier = self._barrier(warp, event, 1, kept)
        parity = event.operands[2]
        parity = parity if isinstance(parity, int) else warp.one(parity(warp))

        def over() -> bool:
            if (barrier.phase & 1) == parity:
                return False
            np.maximum(warp.clock, barrier.seen[0], out=warp.clock)
            np.maximum(warp.fenced, barrier.seen[1], out=warp.fenced)
            warp.registers[event.operands[0]] = warp.all_lanes
            return True

        if not over():
            warp.blocked = over

    # Products

    def _wgmma_fence(self, warp: Warp, event: Event) -> None:
        pass

    def _wgmma_mma_async(self, warp: Warp, event: Event) -> None:
        parts = event.instruction.parts
        n, k = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", parts[4]).groups())  # type: ignore[union-attr]
        targets, a, b, scale, *rest = event.operands
        if isinstance(a, list) or rest[:2] != [1, 1] or parts[5] != "f32":
            raise NotImplementedError(event.instruction.text)
        accumulate = bool(scale) if isinstance(scale, int) else bool(warp.one(scale(warp)))
        majors = tuple(rest[2:]) or (0, 0)
        clock = warp.async_clock()
        clock[warp.products_actor] = warp.products_time
        left, right = warp.one(a(warp)), warp.one(b(warp))
        warp.groups[-1].append(Product(parts[6], targets, left, right, n, k, accumulate, majors, clock))
        warp.in_flight.update(targets)

    def _wgmma_commit_group(self, warp: Warp, event: Event) -> None:
        warp.groups.append([])
        warp.products_time += 1

    def _wgmma_wait_group(self, warp: Warp, event: Event) -> None:
        while len(warp.groups) - 1 > event.operands[0]:
            for product in warp.groups.popleft():
                self._multiply(warp, product)
            warp.clock[warp.products_actor] = warp.products_time - len(warp.groups)
        warp.in_flight = {target for group in warp.groups for product in group for target in product.targets}

    def _multiply(self, warp: Warp, product: Product) -> None:
        if product.done:
            return
        product.done = True
        rows = 16 * (warp.number % 4) + np.arange(16)
        a = self._operand(warp, product, product.a, rows, product.majors[0])
        b = self._operand(warp, product, product.b, np.arange(product.n), product.majors[1])
        # Of a register: [8 columns, upper or lower 8 rows, even or odd column][row, pair of columns].
        shape = product.n // 8, 2, 2, 8, 4
        order = 1, 3, 0, 4, 2
        result = a @ b.T
        if product.accumulate:
            held = np.stack([warp.registers[target] for target in product.targets]).view(np.float32)
            result += held.reshape(shape).transpose(order).reshape(16, product.n)
        laid_out = result.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
        for target, lanes in zip(product.targets, laid_out.reshape(-1, LANES), strict=True):
            warp.registers[target] = np.ascontiguousarray(lanes).view(np.uint32)

    def _operand(self, warp: Warp, product: Product, descriptor: int, rows: Any, major: int) -> Any:
        """(rows, k) of a matrix in shared memory."""
        itemsize = 4 if product.kind == "tf32" else 2
        start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
        mode = {0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62]
        if not mode or descriptor >> 49 & 7:
            raise NotImplementedError("an operand without swizzle, or with an offset of its pattern")
        span = 16 << mode  # bytes in a row of the pattern, of which there are 8
        if major == 0:  # k side by side
            lines, inner = rows, np.arange(product.k // (16 // itemsize)) * 16
            if product.k * itemsize > span:
                raise Fault("a product of more than a row of its operand's pattern")
        else:
            lines, inner = np.arange(product.k), rows[:: 16 // itemsize] * itemsize
        places = start + lines[:, None] // 8 * stride + lines[:, None] % 8 * span
        places = places + inner // span * leading + inner % span
        raw = self.shared.load(swizzled(places.ravel(), mode), 16, warp.products_actor, product.clock)
        kind = "f32" if product.kind == "tf32" else product.kind
        bits = raw.reshape(len(lines), -1).view(_UNSIGNED[8 * itemsize])
        if product.kind == "tf32":  # what is below is not looked at
            bits = bits & np.uint32(0xFFFFE000)
        numbers = from_bits(kind, bits).astype(np.float32)
        return numbers if major == 0 else numbers.T

    # Copies

    def _wait_for_copies(self, warp: Warp, groups: deque[list[Copy]], left: int) -> None:
        while len(groups) - 1 > left:
            for copy in groups.popleft():
                self._finish(copy)
                warp.clock[copy.slot] = max(warp.clock[copy.slot], copy.time)

    def _new_copy(self, do: Callable[[int, Any], None], clock: Any) -> Copy:
        """``do`` with an actor of its own and a clock, some time from now."""
        slot = 2 * self.warps_count + self.copies_made % _COPIES
        self.copies_made += 1
        self.clocks[slot, slot] += 1
        clock[slot] = self.clocks[slot, slot]
        copy = Copy(lambda: do(slot, clock), slot, clock[slot])
        self.copies.append(copy)
        self.touches_global()
        return copy

    def _copy_by_lanes(self, warp: Warp, event: Event, kept: Any) -> None:
        """Each lane its 4, 8 or 16 bytes, of which it may read fewer; the rest are zeros."""
        (to, to_offset, _), (source, source_offset, _), length, *fewer = event.operands
        shared = to(warp)[kept].astype(np.int64) + to_offset
        addresses = source(warp)[kept].astype(np.int64) + source_offset
        lengths = np.full(kept.sum(), length) if not fewer else fewer[0](warp)[kept].astype(np.int64)
        if (shared % length).any() or not np.isin(lengths, (0, length)).all():
            raise Fault(f"cp.async of {length} bytes that is not aligned, or of parts: {lengths}")

        def do(actor: int, clock: Any) -> None:
            values = np.zeros((len(shared), length), np.uint8)
            values[lengths > 0] = self.memory.load(addresses[lengths > 0], length)
            self.shared.store(shared, values, actor, clock)

        warp.loads[-1].append(self._new_copy(do, warp.clock.copy()))
        warp.tick()

    def _copy(self, warp: Warp, event: Event, kept: Any) -> None:
        if kept.sum() != 1:
            raise Fault(f"{kept.sum()} lanes start one copy")
        lane = int(kept.nonzero()[0][0])
        operands, loads = event.operands, "mbarrier::complete_tx::bytes" in event.instruction.parts
        tensor, box = (operands[1], operands[0]) if loads else (operands[0], operands[1])
        described = self.maps[int(tensor[0](warp)[lane]) + tensor[1]]
        origin = [int(np.int32(read(warp)[lane])) for read in tensor[2]][::-1]
        addresses, shared, inside = described.places(origin, self._shared_address(warp, box, kept))
        barrier = self._barrier(warp, event, 2, kept) if loads else None
        known = warp.clock.copy()

        def do(actor: int, clock: Any) -> None:
            if barrier is None:
                if described.rounds:
                    raise Fault("a TMA store that rounds")
                values = self.shared.load(shared, 16, actor, clock)
                self.memory.store(addresses[inside], values[inside])
                return
            values = np.zeros((len(shared), 16), np.uint8)
            values[inside] = self.memory.load(addresses[inside], 16)
            if described.rounds:
                values = rounded_to_tf32(values.view(np.uint32)).view(np.uint8)
            self.shared.store(shared, values, actor, clock)
            np.maximum(barrier.clock, known, out=barrier.clock)
            barrier.clock[actor] = max(barrier.clock[actor], clock[actor])
            barrier.bytes -= described.bytes
            barrier.changed()

        copy = self._new_copy(do, warp.async_clock())
        if barrier is None:
            warp.stores[-1].append(copy)
        warp.tick()
