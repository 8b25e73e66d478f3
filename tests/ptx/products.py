"""wgmma: products of matrices in shared memory, done some time between their issue and the wait for them.

Source: PTX ISA 8.7, asynchronous warpgroup-level matrix instructions: descriptors, and how sums lie in registers.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arithmetic import from_bits, truncated_to_tf32
from .memory import SWIZZLES, UNSIGNED, Fault, SharedMemory, swizzled
from .translate import LANES, Event
from .warp import Warp

_SWIZZLES = {0: 0, 1: 3, 2: 2, 3: 1}  # as matrix descriptors number them, and as TMA does


@dataclass
class Product:
    """One warp's 16 rows of an instruction's 64: targets (+)= a @ b."""

    warp: Warp
    kind: str
    targets: list[int]
    a: int
    b: int
    n: int
    k: int
    accumulates: bool
    majors: tuple[int, int]
    clock: Any
    done: bool = False


class Products:
    """Of one warp, which are done in order, by an actor of its own.

    Args:
        log: what the warps of its group issue, which must be the same.
    """

    def __init__(self, warp: Warp, actor: int, shared: SharedMemory, log: list[tuple[Any, ...]]) -> None:
        self._warp, self._actor, self._shared, self._log = warp, actor, shared, log
        self.issued = 0
        self._groups: deque[list[Product]] = deque([[]])  # the last is not committed yet
        self._time = 1

    def next(self) -> Product | None:
        return next((product for group in self._groups for product in group if not product.done), None)

    def issue(self, event: Event) -> None:
        warp, parts = self._warp, event.instruction.parts
        n, k = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", parts[4]).groups())  # type: ignore[union-attr]
        targets, a, b, scale, *rest = event.operands
        if isinstance(a, list) or rest[:2] != [1, 1] or parts[5] != "f32":
            raise NotImplementedError(event.instruction.text)
        accumulates = scale if isinstance(scale, int) else warp.one(scale(warp))
        if accumulates and not warp.unfenced.isdisjoint(targets):
            raise Fault("registers of a product were touched after the last wgmma.fence")
        clock = warp.for_units()
        clock[self._actor] = self._time
        majors = tuple(rest[2:]) or (0, 0)
        matrices = warp.one(a(warp)), warp.one(b(warp))
        self._groups[-1].append(
            Product(warp, parts[6], targets, *matrices, n, k, bool(accumulates), majors, clock)  # type: ignore[arg-type]
        )
        warp.in_flight.update(targets)
        same = event.instruction.text, matrices, accumulates
        if self.issued == len(self._log):
            self._log.append(same)
        if self._log[self.issued] != same:
            raise Fault(f"warps of a group issue other products: {same} and {self._log[self.issued]}")
        self.issued += 1

    def commit(self) -> None:
        self._groups.append([])
        self._time += 1

    def wait(self, left: int) -> None:
        """Until no more than so many groups are under way."""
        while len(self._groups) - 1 > left:
            for product in self._groups.popleft():
                self.do(product)
            self._warp.clock[self._actor] = self._time - len(self._groups)
        under_way = (product for group in self._groups for product in group)
        self._warp.in_flight = {target for product in under_way for target in product.targets}

    def do(self, product: Product) -> None:
        if product.done:
            return
        product.done = True
        warp = self._warp
        rows = 16 * (warp.number % 4) + np.arange(16)
        result = self._matrix(product, 0, rows) @ self._matrix(product, 1, np.arange(product.n)).T
        # In a register: [8 columns, upper or lower 8 rows, even or odd column][row, pair of columns].
        shape, order = (product.n // 8, 2, 2, 8, 4), (1, 3, 0, 4, 2)
        if product.accumulates:
            held = np.stack([warp.registers[target] for target in product.targets]).view(np.float32)
            result += held.reshape(shape).transpose(order).reshape(16, product.n)
        laid_out = result.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
        for target, lanes in zip(product.targets, laid_out.reshape(-1, LANES), strict=True):
            warp.registers[target] = np.ascontiguousarray(lanes).view(np.uint32)

    def _matrix(self, product: Product, which: int, rows: Any) -> Any:
        """(rows, k) of one of the two, as float32."""
        descriptor, rows_inside = (product.a, product.b)[which], product.majors[which]
        itemsize = 4 if product.kind == "tf32" else 2
        start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
        mode = _SWIZZLES[descriptor >> 62]
        if not mode or descriptor >> 49 & 7:
            raise NotImplementedError("a matrix that is not swizzled, or begins within its pattern")
        span = SWIZZLES[mode]  # bytes in a line of the pattern, of which there are 8
        if rows_inside:  # side by side lie the rows, not k
            lines, inside = np.arange(product.k), rows[:: 16 // itemsize] * itemsize
        else:
            lines, inside = rows, np.arange(0, product.k * itemsize, 16)
            if inside[-1] >= span:
                raise Fault("a product of more than a line of its matrix's pattern")
        places = start + lines[:, None] // 8 * stride + lines[:, None] % 8 * span
        places = places + inside // span * leading + inside % span
        raw = self._shared.load(swizzled(places.ravel(), mode), 16, self._actor, product.clock)
        bits = raw.reshape(len(lines), -1).view(UNSIGNED[8 * itemsize])
        numbers = (
            truncated_to_tf32(bits) if product.kind == "tf32" else from_bits(product.kind, bits).astype(np.float32)
        )
        return numbers.T if rows_inside else numbers
