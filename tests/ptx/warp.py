"""32 lanes in step: their registers, what they know of the others, and their own reads and writes of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import UNSIGNED, Fault
from .translate import LANES

if TYPE_CHECKING:
    from .block import Block


class Warp:
    """One warp of a block; pieces of its program (translate.py) read and write it.

    Attributes:
        step: of the program, which comes next.
        clock: up to which of everybody's times it knows what they did.
        fenced: up to which of each warp's times TMA and products see its ordinary stores.
        blocked: what to ask whether it may go on; None if it may.
    """

    def __init__(self, block: Block, number: int) -> None:
        self.block, self.number, self.step, self.done = block, number, 0, False
        self.blocked: Callable[[], bool] | None = None
        self.clock = np.zeros(block.actors, np.int64)
        self.clock[number] = 1
        self.fenced = np.zeros(block.actors, np.int64)
        lanes = np.arange(LANES, dtype=np.uint32)
        self.all_lanes, self.first_lane = np.ones(LANES, np.bool_), lanes == 0
        whole = lambda value: np.full(LANES, value, np.uint32)
        self.special = {"%tid.x": lanes + np.uint32(LANES * number), "%tid.y": whole(0), "%tid.z": whole(0)}
        self.special |= {f"%ctaid.{axis}": whole(i) for axis, i in zip("xyz", block.index, strict=True)}
        self.special |= {f"%nctaid.{axis}": whole(i) for axis, i in zip("xyz", block.grid, strict=True)}
        # What nobody wrote is anything.
        self.registers = [block.garbage(width) for width in block.translation.widths]
        self.in_flight: set[int] = set()  # registers of products under way
        self.unfenced: set[int] = set()  # computed, or computed with, since the last wgmma.fence

    def tick(self) -> None:
        """What it does from here on others do not know yet."""
        self.clock[self.number] += 1

    def for_units(self) -> Any:
        """Its clock, as TMA and products for it have it: of ordinary stores what was fenced."""
        clock, warps = self.clock.copy(), len(self.block.warps)
        clock[:warps] = self.fenced[:warps]
        return clock

    def one(self, x: Any, kept: Any = None) -> int:
        """What all lanes that take part have alike."""
        values = x if kept is None else x[kept]
        if (values != values[0]).any():
            raise Fault(f"lanes of a warp differ where they must not: {values}")
        return int(values[0])

    # Memory

    def load(self, space: str, address: Any, offset: int, bits: int, old: list[Any], kept: Any) -> list[Any]:
        """Registers, which keep what they held in lanes that take no part."""
        length, addresses = len(old) * bits // 8, address[kept].astype(np.int64) + offset
        if space == "global":
            self.block.touches_global(self)
            raw = self.block.memory.load(addresses, length)
        else:
            raw = self.block.shared.load(addresses, length, self.number, self.clock)
        found = np.ascontiguousarray(raw).view(UNSIGNED[bits])
        result = [register.copy() for register in old]
        for i, register in enumerate(result):
            register[kept] = found[:, i]
        return result

    def store(self, space: str, address: Any, offset: int, bits: int, values: list[Any], kept: Any) -> None:
        addresses = address[kept].astype(np.int64) + offset
        raw = np.stack([value[kept].astype(UNSIGNED[bits]) for value in values], 1).view(np.uint8)
        if space == "global":
            self.block.touches_global(self)
            self.block.memory.store(addresses, raw)
        else:
            self.block.shared.store(addresses, raw, self.number, self.clock)

    def store_matrix(self, address: Any, offset: int, values: list[Any], transposed: bool) -> None:
        """stmatrix: 8 x 8 elements of 16 bits each, whose rows lie where the lanes 8 i to 8 i + 7 say."""
        for i, value in enumerate(values):
            matrix = np.ascontiguousarray(value).view(np.uint16).reshape(8, 8)  # [lane // 4, 2 * (lane % 4) + half]
            rows = np.ascontiguousarray(matrix.T if transposed else matrix).view(np.uint8)
            self.block.shared.store(self._rows(address, offset, i), rows, self.number, self.clock)

    def load_matrix(self, address: Any, offset: int, count: int, transposed: bool) -> list[Any]:
        """ldmatrix, the reverse."""
        result = []
        for i in range(count):
            raw = self.block.shared.load(self._rows(address, offset, i), 16, self.number, self.clock)
            matrix = np.ascontiguousarray(raw).view(np.uint16)
            matrix = np.ascontiguousarray(matrix.T if transposed else matrix)
            result.append(matrix.reshape(LANES, 2).view(np.uint32)[:, 0])
        return result

    def _rows(self, address: Any, offset: int, i: int) -> Any:
        addresses = address[8 * i : 8 * i + 8].astype(np.int64) + offset
        if (addresses % 16).any():
            raise Fault("a row of a matrix that does not divide by 16 bytes")
        return addresses

    # Registers

    def shuffle(self, mode: str, x: Any, other: Any, segment: Any) -> Any:
        """What another lane has."""
        if mode not in ("bfly", "idx") or (segment != LANES - 1).any():
            raise NotImplementedError(f"shfl.{mode}, in parts of a warp: {segment}")
        lanes = other.astype(np.int64)
        return x[np.arange(LANES) ^ lanes if mode == "bfly" else lanes]

    def unpacked(self, x: Any, parts: int) -> list[Any]:
        pieces = np.ascontiguousarray(x).view(UNSIGNED[8 * x.itemsize // parts]).reshape(LANES, parts)
        return list(np.ascontiguousarray(pieces.T))

    def packed(self, parts: list[Any]) -> Any:
        return np.ascontiguousarray(np.stack(parts, 1)).view(UNSIGNED[8 * parts[0].itemsize * len(parts)])[:, 0]
