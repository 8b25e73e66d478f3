"""Gluon kernels for Hopper on the CPU: the very same functions, with Gluon's names bound to a model of the machine.

    launcher_module._kernel = Emulated(launcher_module._kernel, seed=0)

Partitions of ``warp_specialize`` run as tasks, one at a time, and change places at every
synchronisation as a seeded schedule has it. Copies and products are asynchronous: they take place
some time between their issue and the wait for them, also as the schedule has it, products and
stores of a task in order, loads in any. Programs run one after another.

What depends on luck on a GPU is an error here on every schedule. An access to shared memory must
come after each earlier one it conflicts with by a chain of arrivals, waits and completions; that is
tracked for each access (:class:`Hazard`), whatever the values turn out to be. A TMA store must not
read what ordinary stores wrote before a fence (:class:`MissingFence`), nor anything touch global
memory before the wait for the launch before (:class:`TooEarly`). If nothing can go on, that is
:class:`Deadlock`. Memory is NaN until written.

Not modelled: threads within a partition (the compiler places their barriers), swizzles (but a
window must begin where they repeat), registers, clusters.
"""

from __future__ import annotations

import inspect
import math
import random
import textwrap
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as real
from triton.runtime.jit import JITCallable

from .block import Allocation, Barrier, Block, Operation, Shared
from .tiles import Gluon, Pointer, Tile


class Accumulator:
    """What products in flight will leave."""

    def __init__(self, data: Tensor, layout: Any) -> None:
        self.data, self.layout = data, layout


class Descriptor:
    """A TMA descriptor."""

    def __init__(self, host: Any) -> None:
        self.base, self.layout = host.base, host.layout
        dtype = getattr(real, str(host.base.dtype).removeprefix("torch."))
        shape = list(host.block_shape)
        assert all(n <= 256 for n in shape), f"a box is at most 256 a side, not {shape}"
        self.block_type = types.SimpleNamespace(shape=shape, nbytes=math.prod(shape) * host.base.itemsize)
        self.dtype = dtype

    def box(self, origin: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """What of the tensor and what of the box overlap."""
        assert len(origin) == self.base.dim()
        inner, outer = [], []
        for o, size, n in zip(origin, self.block_type.shape, self.base.shape, strict=True):
            low, high = max(o, 0), max(min(o + size, n), max(o, 0))
            outer.append(slice(low, high))
            inner.append(slice(low - o, high - o))
        return tuple(outer), tuple(inner)

    def read(self, origin: list[int]) -> Tensor:
        outer, inner = self.box(origin)
        result = torch.zeros(self.block_type.shape, dtype=self.base.dtype)
        result[inner] = self.base[outer]
        return result

    def write(self, origin: list[int], value: Tensor) -> None:
        outer, inner = self.box(origin)
        self.base[outer] = value[inner]


class Machine:
    """Gluon's names, for the functions of one program."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.names: dict[str, Any] = {
            "gl": Gluon(block, self.allocate),
            "mbarrier": self,
            "tma_load": self.load,
            "tma_store": self.tma_store,
            "tma_store_wait": lambda outstanding: block.wait_for("store", outstanding),
            "fence_async_shared": self.fence,
            "gdc_launch_dependents": lambda: None,
            "gdc_wait": lambda: setattr(block, "may_begin", True),
            "warpgroup_mma": self.product,
            "warpgroup_mma_wait": self.product_wait,
            "reinterpret": lambda view, shape, layout: view.reinterpret(shape, layout),
        }

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        allocation = Allocation(self.block, dtype, shape)
        self.block.allocations.append(allocation)
        return Shared(allocation, 0, list(shape), layout)

    # --- mbarrier ----------------------------------------------------------------------------

    MBarrierLayout = staticmethod(lambda: None)

    @staticmethod
    def _barrier(view: Shared) -> Barrier:
        found = view.allocation.barriers.get(view.offset)
        assert found is not None, "an mbarrier that nobody initialised"
        return found

    def init(self, view: Shared, count: int) -> None:
        view.allocation.barriers[view.offset] = Barrier(count)

    def wait(self, view: Shared, parity: int) -> None:
        barrier = self._barrier(view)
        self.block.switch(lambda: barrier.passed(parity), f"parity {parity} in phase {barrier.phase}")
        self.block.task.known |= barrier.known

    def arrive(self, view: Shared, count: int = 1, pred: bool = True) -> None:
        self.block.switch()
        if pred:
            self._barrier(view).arrive(count, self.block.task.known)

    def expect(self, view: Shared, size: int) -> None:
        self.block.switch()
        barrier = self._barrier(view)
        barrier.bytes += size
        barrier.arrive(1, self.block.task.known)

    # --- copies ------------------------------------------------------------------------------

    def load(self, descriptor: Descriptor, origin: list[int], view: Shared, target: Shared) -> None:
        self.block.switch()
        self.block.touch_global()
        assert target.shape == descriptor.block_type.shape and target.order is None
        barrier = self._barrier(view)
        event = self.block.access(target, True, "a TMA load")
        known = self.block.task.known | event

        def run() -> None:
            target.data().copy_(descriptor.read(origin))
            barrier.bytes -= descriptor.block_type.nbytes
            barrier.gathered |= known
            barrier.flip()

        self.block.loads.append(Operation("load", event, known, run))

    def tma_store(self, descriptor: Descriptor, origin: list[int], source: Shared) -> None:
        self.block.switch()
        self.block.touch_global()
        assert source.shape == descriptor.block_type.shape and source.order is None
        event = self.block.access(source, False, "a TMA store", asynchronous=True)
        run = lambda: descriptor.write(origin, source.data())
        self.block.task.queues["store"].append(Operation("store", event, self.block.task.known, run))

    def fence(self) -> None:
        self.block.switch()
        self.block.task.unfenced = 0

    # --- products ----------------------------------------------------------------------------

    def product(self, a: Shared, b: Shared, acc: Any, is_async: bool) -> Accumulator:
        self.block.switch()
        assert is_async and a.shape[0] == 64
        events = [self.block.access(view, False, "a product", asynchronous=True) for view in (a, b)]
        sum_ = acc if isinstance(acc, Accumulator) else Accumulator(acc.data.clone(), acc.layout)

        def run() -> None:
            sum_.data += a.data().float() @ b.data().float()

        operation = Operation("product", events[0] | events[1], self.block.task.known, run)
        self.block.task.queues["product"].append(operation)
        return sum_

    def product_wait(self, num_outstanding: int, deps: list[Accumulator]) -> Any:
        self.block.wait_for("product", num_outstanding)
        (acc,) = deps
        return acc if self.block.task.queues["product"] else Tile(acc.data, acc.layout)


class Emulated:
    """A kernel that is launched as the real one is.

    Args:
        kernel: a function under ``gluon.jit``.
        seed: of the schedule.
        eagerness: how soon copies and products take place: 0 at the last moment, 1 at once.
        mutations: ``{function: (text, other text)}``, to see that an error is found.
    """

    def __init__(
        self, kernel: Any, seed: int, eagerness: float = 0.5, mutations: dict[str, tuple[str, str]] | None = None
    ) -> None:
        self.kernel, self.seed, self.eagerness, self.mutations = kernel, seed, eagerness, dict(mutations or {})

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        (programs,) = grid

        def launch(*arguments: Any, num_warps: int, launch_pdl: bool, enable_fp_fusion: bool, **options: Any) -> None:
            assert num_warps == 4 and launch_pdl and enable_fp_fusion
            rng = random.Random(self.seed)
            values = [_argument(a) for a in arguments]
            applied: set[str] = set()
            for program in range(programs):
                block = Block(program, programs, rng, self.eagerness)
                kernel = _translate(self.kernel, Machine(block).names, self.mutations, {}, applied)
                kernel(*values, **options)
            assert applied == set(self.mutations), "a mutation that applies to nothing"

        return launch


def _argument(value: Any) -> Any:
    if hasattr(value, "block_shape"):
        return Descriptor(value)
    return Pointer(value) if isinstance(value, Tensor) else value


def _translate(
    jit: JITCallable,
    names: dict[str, Any],
    mutations: dict[str, tuple[str, str]],
    seen: dict[str, Any],
    applied: set[str],
) -> Callable[..., Any]:
    """The function under a jit decorator and all it calls, with ``names`` for Gluon's."""
    if jit.fn.__qualname__ in seen:
        return seen[jit.fn.__qualname__]
    scope = {"__builtins__": __builtins__}
    code = jit.fn.__code__
    if jit.fn.__name__ in mutations:
        old, new = mutations[jit.fn.__name__]
        source = textwrap.dedent(inspect.getsource(jit.fn)).removeprefix("@gluon.jit\n")
        assert source.count(old) == 1, f"{source.count(old)} times in {jit.fn.__name__}: {old}"
        exec(source.replace(old, new), module := {"gl": real})
        code = module[jit.fn.__name__].__code__
        applied.add(jit.fn.__name__)
    function = types.FunctionType(code, scope, jit.fn.__name__, jit.fn.__defaults__)
    seen[jit.fn.__qualname__] = function
    for name in jit.fn.__code__.co_names:
        value = jit.fn.__globals__.get(name)
        if name in names:
            scope[name] = names[name]
        elif isinstance(value, JITCallable):
            scope[name] = _translate(value, names, mutations, seen, applied)
    return function
