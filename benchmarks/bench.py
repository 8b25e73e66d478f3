"""Run cases one after another in a process of their own, which is replaced when a provider takes it down.

A provider that raises is one row with its reason. So is one that kills the process (a segmentation
fault, a poisoned CUDA context, memory) or keeps it for too long; the case starts again without it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .measure import At, DeviceLost, Job, Machine, make_row, measure, reason_of
from .providers import PROVIDERS
from .rows import Row
from .timing import Ceilings


def this_machine(device: str) -> Machine:
    """Of ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; the run gets an id of its own."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return Machine(
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=triton,
        cudnn=str(torch.backends.cudnn.version() or "none") if device != "cpu" else "none",
        commit=this_commit(),
        run_id=uuid.uuid4().hex[:12],
    )


def this_commit() -> str:
    """What git says of this checkout; ``"unknown"`` without git, or in a copy that is none."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def device_name(device: str) -> str:
    """What the maker calls the device of ``"cpu"``, ``"cuda"`` or ``"cuda:N"``."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run(
    cases: Sequence[Case],
    providers: Sequence[str],
    device: str,
    *,
    seconds: float,
    limit: float,
    budget: float | None,
    seed: int,
    on_case: Callable[[Case], None] = lambda case: None,
) -> Iterator[Row]:
    """Rows, case by case, as they come.

    Args:
        cases: in the order in which they run. providers: names, in the order of ``PROVIDERS``.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        seconds: of timing for each case, checks and warm-up not counted.
        limit: seconds that a provider may take for its first result, or for a call.
        budget: start no case after so many seconds; None for no limit.
        on_case: called before each case.
    """
    machine, worker, start = this_machine(device), Worker(limit), time.monotonic()
    try:
        for case in cases:
            if budget is not None and time.monotonic() - start > budget:
                return
            kind = torch.device(device).type
            serving = tuple(p for p in PROVIDERS if p.name in providers and p.serves(case, kind))
            if serving:
                on_case(case)
                yield from worker.do(Job(case, serving, device, seconds, seed, machine))
    finally:
        worker.stop()


class Worker:
    """A process that does one job after another, and is replaced when it dies or hangs."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._context = multiprocessing.get_context("spawn")
        # Shared memory, so that saying who runs costs no time and survives the process: the provider's
        # place in the job (-1 for none), whether it is a graph, since when.
        self._place, self._graph = (self._context.Value("i", 0, lock=False) for _ in range(2))
        self._since = self._context.Value("d", 0.0, lock=False)
        self._process: Any = None
        self._pipe: Any = None

    def do(self, job: Job) -> list[Row]:
        """The job's rows; a provider that takes the process down gets one that says so."""
        dead: list[Row] = []
        while True:
            answer = self._ask(job)
            if isinstance(answer, list):
                return [*answer, *dead]
            if self._place.value < 0:
                reason = f"{answer}, before any provider: at inputs, or the results to check against"
                return [make_row(job, provider.name, "failed", reason=reason) for provider in job.providers]
            culprit = job.providers[self._place.value].name, bool(self._graph.value)
            dead.append(make_row(job, culprit[0], "failed", reason=answer, graph=culprit[1]))
            job = dataclasses.replace(job, without=job.without | {culprit})

    def _ask(self, job: Job) -> list[Row] | str:
        """The rows, or why the process died."""
        self._place.value, self._since.value = -1, time.monotonic()
        reason = ""
        try:
            if self._process is None:
                self._pipe, theirs = self._context.Pipe()
                arguments = theirs, self._place, self._graph, self._since
                self._process = self._context.Process(target=_work, args=arguments, daemon=True)
                self._process.start()
                theirs.close()
            self._pipe.send(job)
            while True:
                if self._pipe.poll(0.5):
                    message = self._pipe.recv()
                    if isinstance(message, list):
                        return message
                    reason = message
                elif not reason and time.monotonic() - self._since.value > self.limit:
                    reason = f"no result within {self.limit:.0f} s"
                    self._process.kill()
        except (EOFError, OSError):
            process: Any = self._process
            process.join()
            code, self._process = process.exitcode, None
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return reason or f"the process died ({name})"

    def stop(self) -> None:
        """Ask it to end; then make it."""
        if self._process is None:
            return
        self._pipe.close()
        self._process.terminate()
        self._process.join(3)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None


def _work(pipe: Any, place: Any, graph: Any, since: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # the orderly way out, which leaves nothing behind
    measured: dict[str, Ceilings] = {}  # by dtype, once a run
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        use(torch.device(job.device))
        names = [provider.name for provider in job.providers]

        def at(name: str, is_graph: bool) -> None:
            place.value, graph.value, since.value = names.index(name), is_graph, time.monotonic()  # noqa: B023

        since.value = time.monotonic()
        try:
            pipe.send(measure_or_say_why(job, measured, at))
        except DeviceLost as lost:
            pipe.send(str(lost))
            os._exit(1)  # the CUDA context is past an orderly way out


def use(device: torch.device) -> None:
    """Make it the current one; ``cuda``, without a number, is that."""
    if device.index is not None:
        torch.cuda.set_device(device)


def measure_or_say_why(job: Job, measured: dict[str, Ceilings], at: At) -> list[Row]:
    """:func:`measure`; if inputs or truth cannot be made, a row for each provider says why."""
    try:
        return measure(job, measured, at)
    except DeviceLost:
        raise
    except Exception as error:
        return [make_row(job, provider.name, "failed", reason=reason_of(error)) for provider in job.providers]
