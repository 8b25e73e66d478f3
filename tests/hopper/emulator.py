"""Gluon kernels for Hopper on the CPU: the very same functions, with Gluon's names bound to a model of the machine.

    launcher_module._kernel = Emulated(launcher_module._kernel, seed=0)

Partitions of ``warp_specialize`` run as tasks, one at a time, and change places at every
synchronisation as a seeded schedule has it. Copies and products are asynchronous: they take place
some time between their issue and the wait for them, also as the schedule has it, products and
stores of a task in order, loads in any. Programs run one after another.

What depends on luck on a GPU is an error here on every schedule. An access to shared memory must
come after each earlier one it conflicts with by a chain of arrivals, waits and completions; that is
tracked for each access (:class:`Hazard`), whatever the values turn out to be. A TMA store must not
read what ordinary stores wrote before a fence (:class:`MissingFence`). If nothing can go on, that is
:class:`Deadlock`. Memory is NaN until written.

Not modelled: threads within a partition (the compiler places their barriers), swizzles (but a
window must begin where they repeat), registers, clusters.
"""

from __future__ import annotations

import inspect
import math
import random
import textwrap
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as real
from triton.runtime.jit import JITCallable

from .tiles import Gluon, Pointer, Tile, torch_dtype


class Hazard(AssertionError):
    """An access to shared memory that nothing orders after one it conflicts with."""


class MissingFence(Hazard):
    """A TMA store of what ordinary stores wrote, without a fence between."""


class Deadlock(AssertionError):
    """No task can go on and no copy or product is under way."""


class _Abort(BaseException):
    """Ends a task's thread when another has failed."""


@dataclass
class Access:
    """An earlier access to elements [start, end) of an allocation; ``event`` is one bit."""

    start: int
    end: int
    event: int
    writes: bool
    what: str


class Allocation:
    """Shared memory, one element type, flat."""

    def __init__(self, block: Block, dtype: Any, shape: list[int]) -> None:
        self.block, self.dtype = block, dtype
        fill = 0 if dtype == real.int64 else math.nan
        self.data = torch.full((math.prod(shape),), fill, dtype=torch_dtype(dtype))
        self.accesses: list[Access] = []
        self.barriers: dict[int, Barrier] = {}


@dataclass
class Shared:
    """A view: as ``shared_memory_descriptor`` has it."""

    allocation: Allocation
    offset: int
    shape: list[int]
    layout: Any
    order: tuple[int, ...] | None = None

    @property
    def dtype(self) -> Any:
        return self.allocation.dtype

    @property
    def range(self) -> tuple[int, int]:
        return self.offset, self.offset + math.prod(self.shape)

    def index(self, i: int) -> Shared:
        assert 0 <= i < self.shape[0], f"index {i} of {self.shape}"
        rest = self.shape[1:]
        return Shared(self.allocation, self.offset + i * math.prod(rest), rest, self.layout)

    def slice(self, start: int, length: int) -> Shared:
        assert 0 <= start and start + length <= self.shape[0]
        offset = self.offset + start * math.prod(self.shape[1:])
        return Shared(self.allocation, offset, [length, *self.shape[1:]], self.layout)

    def reshape(self, shape: list[int]) -> Shared:
        assert math.prod(shape) == math.prod(self.shape)
        return Shared(self.allocation, self.offset, shape, self.layout)

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.allocation, self.offset, self.shape, self.layout, tuple(order))

    def reinterpret(self, shape: list[int], layout: Any) -> Shared:
        size = torch_dtype(self.dtype).itemsize
        assert shape[-1] == self.shape[-1] and shape[-1] * size == layout.swizzle_byte_width
        assert self.offset * size % (8 * layout.swizzle_byte_width) == 0, "a window begins within a swizzle"
        assert self.offset + math.prod(shape) <= self.allocation.data.numel(), "a window beyond its ring"
        return Shared(self.allocation, self.offset, list(shape), layout)

    def data(self) -> Tensor:
        start, end = self.range
        data = self.allocation.data[start:end].view(self.shape)
        return data if self.order is None else data.permute(self.order)

    def store(self, tile: Tile) -> None:
        block = self.allocation.block
        block.switch()
        event = block.access(self, True, "an ordinary store")
        block.task.known |= event
        block.task.unfenced |= event
        self.data().copy_(tile.data)


class Barrier:
    """An mbarrier: arrivals and bytes that its phase still waits for."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = self.known = self.gathered = 0

    def arrive(self, count: int, known: int) -> None:
        if count > self.pending:
            raise Hazard("more arrivals at a barrier than its phase waits for")
        self.pending -= count
        self.gathered |= known
        self.flip()

    def flip(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending, self.known = self.count, self.known | self.gathered

    def passed(self, parity: int) -> bool:
        """Whether the phase of this parity is over: one bit, as the machine has it."""
        return (self.phase & 1) != parity


class Signal:
    """A semaphore of one: a bare lock, which is several times quicker than ``threading.Semaphore``."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()
        self.acquire, self.release = self.lock.acquire, self.lock.release


@dataclass
class Operation:
    """A copy or product under way."""

    kind: str
    event: int
    known: int
    run: Callable[[], None]
    done: bool = False


@dataclass(eq=False)
class Task:
    """A partition."""

    name: str
    body: Callable[[], None]
    known: int = 0
    unfenced: int = 0
    ready: Callable[[], bool] = lambda: True
    waits_for: str = ""
    queues: dict[str, list[Operation]] = field(default_factory=lambda: {"product": [], "store": []})
    turn: Signal = field(default_factory=lambda: Signal())
    finished: bool = False


class Accumulator:
    """What products in flight will leave."""

    def __init__(self, data: Tensor, layout: Any) -> None:
        self.data, self.layout = data, layout


class Block:
    """One program: its shared memory, tasks and schedule."""

    def __init__(self, program: int, programs: int, rng: random.Random, eagerness: float) -> None:
        self.program, self.programs, self.rng, self.eagerness = program, programs, rng, eagerness
        self.events = 0
        self.loads: list[Operation] = []
        self.tasks: list[Task] = []
        self.back = Signal()
        self.failure: BaseException | None = None
        self.main = self.task = Task("main", lambda: None)
        self.allocations: list[Allocation] = []

    # --- order -------------------------------------------------------------------------------

    def access(self, view: Shared, writes: bool, what: str, asynchronous: bool = False) -> int:
        """Record an access by the running task and return its event."""
        start, end = view.range
        kept = []
        for old in view.allocation.accesses:
            if old.start < end and start < old.end and (writes or old.writes):
                if not old.event & self.task.known:
                    raise Hazard(f"{self.task.name}: {what} is not ordered after {old.what}")
                if asynchronous and any(old.event & task.unfenced for task in (*self.tasks, self.main)):
                    raise MissingFence(f"{self.task.name}: {what} after {old.what} without a fence")
            if not (writes and start <= old.start and old.end <= end):
                kept.append(old)
        event = 1 << self.events
        self.events += 1
        view.allocation.accesses = [*kept, Access(start, end, event, writes, f"{what} of {self.task.name}")]
        return event

    def switch(self, ready: Callable[[], bool] = lambda: True, waits_for: str = "") -> None:
        """Let others go first; come back when ``ready``."""
        task = self.task
        if task is self.main:
            assert ready(), f"main waits for {waits_for}"
            return
        task.ready, task.waits_for = ready, waits_for
        self.back.release()
        task.turn.acquire()
        if self.failure is not None:
            raise _Abort
        self.task = task

    def finish(self, operation: Operation) -> None:
        if not operation.done:
            operation.done = True
            operation.run()

    # --- schedule ----------------------------------------------------------------------------

    def specialize(self, functions: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        names = [f"{i} {function.__name__}" for i, (function, _) in enumerate(functions)]
        for name, (function, arguments) in zip(names, functions, strict=True):
            self.tasks.append(Task(name, lambda f=function, a=arguments: f(*a), known=self.main.known))
        threads = [threading.Thread(target=self._thread, args=(task,), daemon=True) for task in self.tasks]
        for thread in threads:
            thread.start()
        try:
            self._schedule()
        except BaseException as error:
            self.failure = self.failure or error
        for task in self.tasks:
            if not task.finished:  # after a failure: it ends at once
                task.turn.release()
                self.back.acquire()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def _thread(self, task: Task) -> None:
        task.turn.acquire()
        try:
            if self.failure is None:
                self.task = task
                task.body()
                if task.queues["store"]:
                    raise Hazard(f"{task.name} ends while its stores read shared memory")
                if task.queues["product"]:
                    raise Hazard(f"{task.name} ends while its products run")
        except _Abort:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        task.finished = True
        self.back.release()

    def _schedule(self) -> None:
        while self.failure is None:
            operations = [*self.loads, *(queue[0] for task in self.tasks for queue in self._open(task))]
            tasks = [task for task in self.tasks if not task.finished and task.ready()]
            if operations and (not tasks or self.rng.random() < self.eagerness):
                operation = self.rng.choice(operations)
                self.finish(operation)
                if operation in self.loads:
                    self.loads.remove(operation)
            elif tasks:
                task = self.rng.choice(tasks)
                task.turn.release()
                self.back.acquire()
            elif all(task.finished for task in self.tasks):
                return
            else:
                waits = "; ".join(f"{t.name}: {t.waits_for}" for t in self.tasks if not t.finished)
                raise Deadlock(f"nothing can go on: {waits}")

    @staticmethod
    def _open(task: Task) -> list[list[Operation]]:
        """Operations that have not taken place yet, in order, of each kind that has any."""
        queues = ([o for o in queue if not o.done] for queue in task.queues.values())
        return [queue for queue in queues if queue]

    def wait_for(self, kind: str, outstanding: int) -> None:
        """Until no more than so many of the running task's operations are under way."""
        self.switch()
        queue = self.task.queues[kind]
        while len(queue) > outstanding:
            operation = queue.pop(0)
            self.finish(operation)
            self.task.known |= operation.event


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

        def launch(*arguments: Any, num_warps: int, **options: Any) -> None:
            assert num_warps == 4
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
