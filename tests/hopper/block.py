"""Shared memory, partitions and their schedule in the emulator: who may touch what, and when."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as real

from .tiles import Tile, torch_dtype


class Hazard(AssertionError):
    """An access to shared memory that nothing orders after one it conflicts with."""


class MissingFence(Hazard):
    """A TMA store of what ordinary stores wrote, without a fence between."""


class TooEarly(AssertionError):
    """A touch of global memory, which the launch before may still be writing or reading."""


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
        self.may_begin = False  # set by the wait for the launch before

    def touch_global(self) -> None:
        if not self.may_begin:
            raise TooEarly(f"{self.task.name} touches global memory before it waited for the launch before")

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
