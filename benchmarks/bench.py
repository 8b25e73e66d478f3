"""Run cases: check each provider's output against float64, time those that pass, one row each.

A case runs in a worker process. A provider that raises is one row with its reason; one that takes
the process down with it (a segmentation fault, a poisoned CUDA context, memory) too, and the case
starts again without it.
"""

from __future__ import annotations

import copy
import datetime
import importlib.metadata
import multiprocessing
import platform
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.parity import Parity, compare

from .cases import DTYPES, Case
from .providers import PROVIDERS, Call, Provider, Work, make_work, settings
from .rows import Row
from .timing import Ceilings, Clock, Stats, capture, ceilings, interleave


@dataclass(frozen=True)
class Machine:
    """What every row says of where and when it was measured."""

    device: str
    threads: int
    torch: str
    triton: str
    cudnn: str
    commit: str
    run_id: str


def this_machine(device: str) -> Machine:
    """Of ``"cpu"`` or ``"cuda"``; the run gets an id of its own."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return Machine(
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=triton,
        cudnn=str(torch.backends.cudnn.version() or "none"),
        commit=git.stdout.strip() or "unknown",
        run_id=uuid.uuid4().hex[:12],
    )


def device_name(device: str) -> str:
    """What the maker calls the device of ``"cpu"`` or ``"cuda"``."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Job:
    """One case for the worker."""

    case: Case
    providers: tuple[Provider, ...]
    device: str
    seconds: float
    seed: int
    machine: Machine


def run(
    cases: Sequence[Case],
    providers: Sequence[str],
    device: str,
    *,
    seconds: float,
    budget: float | None,
    seed: int,
    on_case: Callable[[Case], None] = lambda case: None,
) -> Iterator[Row]:
    """Rows, case by case, as they come.

    Args:
        cases: in the order in which they run. providers: names, in the order of ``PROVIDERS``.
        device: ``"cpu"`` or ``"cuda"``.
        seconds: of timing for each case, checks and warm-up not counted.
        budget: start no case after so many seconds; None for no limit.
        on_case: called before each case.
    """
    machine, worker, start = this_machine(device), _Worker(), time.monotonic()
    try:
        for case in cases:
            if budget is not None and time.monotonic() - start > budget:
                return
            on_case(case)
            serving = tuple(p for p in PROVIDERS if p.name in providers and p.serves(case, device))
            yield from worker.do(Job(case, serving, device, seconds, seed, machine))
    finally:
        worker.stop()


class _Worker:
    """A process that does one job after another, and is replaced when it dies."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Any = None

    def do(self, job: Job) -> list[Row]:
        """The job's rows; a provider that kills the process gets one that says so."""
        dead: list[Row] = []
        while True:
            if self._process is None or not self._process.is_alive():
                self._pipe, theirs = self._context.Pipe()
                self._process = self._context.Process(target=_work, args=(theirs,), daemon=True)
                self._process.start()
                theirs.close()
            at = ""
            try:
                self._pipe.send(job)
                while True:
                    message = self._pipe.recv()
                    if isinstance(message, list):
                        return [*message, *dead]
                    at = message
            except (EOFError, ConnectionError, BrokenPipeError):
                self._process.join()
                code = self._process.exitcode
                name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                dead.append(_row(job, at, "failed", f"the process died ({name})", None))
                left = tuple(p for p in job.providers if p.name != at)
                if not at or not left:
                    return dead
                job = Job(job.case, left, job.device, job.seconds, job.seed, job.machine)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.join()


def _work(pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    measured: dict[str, Ceilings] = {}  # by dtype, once a run
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(measure_or_say_why(job, measured, pipe.send))


def measure_or_say_why(job: Job, measured: dict[str, Ceilings], at: Callable[[str], None]) -> list[Row]:
    """:func:`measure`; if inputs or truth cannot be made, a row for each provider says why."""
    try:
        return measure(job, measured, at)
    except Exception as error:
        return [_row(job, provider.name, "failed", _reason(error), None) for provider in job.providers]


def measure(job: Job, measured: dict[str, Ceilings], at: Callable[[str], None]) -> list[Row]:
    """The rows of one case: outputs checked first, then those that pass timed in interleaved rounds.

    Args:
        measured: ceilings by dtype; filled here.
        at: called with each provider's name before it runs.
    """
    case, clock = job.case, Clock(torch.device(job.device))
    with settings(case.dtype):
        if case.dtype not in measured:
            measured[case.dtype] = ceilings(clock, DTYPES[case.dtype])
        ceiling = measured[case.dtype]
        work = make_work(case, clock.device, job.seed)
        truth, baseline = truth_of(work), baseline_of(work)
        baseline_error = (baseline.double() - truth).abs().max().item()
        rows: list[Row] = []
        calls: dict[str, Call] = {}
        first: dict[str, float] = {}
        errors: dict[str, float] = {}
        for provider in job.providers:
            at(provider.name)
            name, output = provider.name, []
            try:
                call = provider.prepare(work)
                first[name] = clock.first(lambda call=call, output=output: output.append(call().detach().clone()))
                parity = check(output[0], baseline, truth, case)
                errors[name] = parity.candidate_error
                if not parity.ok:
                    rows.append(_row(job, name, "wrong", str(parity), ceiling, parity.candidate_error, baseline_error))
                    continue
                calls[name] = call
            except Exception as error:  # whatever a provider raises is its row
                rows.append(_row(job, name, "failed", _reason(error), ceiling))
        for graph, some in _passes(calls, clock, rows, job, ceiling, at):
            timed = interleave(clock, some, seconds=job.seconds) if some else {}
            for name, found in timed.items():
                peak = clock.peak_mb(some[name])
                rows.append(
                    _row(job, name, "ok", "", ceiling, errors[name], baseline_error, found, peak, first[name], graph)
                )
    return rows


def _reason(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _passes(
    calls: dict[str, Call], clock: Clock, rows: list[Row], job: Job, ceiling: Ceilings, at: Callable[[str], None]
) -> Iterator[tuple[bool, dict[str, Callable[[], object]]]]:
    """All calls as they are; on CUDA also their graphs, of those that can be captured."""
    yield False, dict(calls)
    if not clock.cuda:
        return
    graphs: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        at(name)
        try:
            graphs[name] = capture(call)
        except Exception as error:
            rows.append(_row(job, name, "failed", f"cannot be captured, {_reason(error)}", ceiling, graph=True))
            torch.cuda.synchronize()
    yield True, graphs


def check(output: Tensor, baseline: Tensor, truth: Tensor, case: Case) -> Parity:
    if output.shape != truth.shape:
        return Parity(False, 0.0, 0.0, 0.0, f"shape {tuple(output.shape)}, expected {tuple(truth.shape)}")
    dtype = DTYPES[case.dtype]  # a training step's loss is float32, but rests on the working dtype
    tf32 = case.dtype == "tf32" and output.is_cuda
    return compare(output.to(dtype), baseline.to(dtype), truth, tf32=tf32, stages=len(case.layers))


@torch.no_grad()
def truth_of(work: Work) -> Tensor:
    """The output, or of a training step the loss, in float64."""
    y = copy.deepcopy(work.module).double()(*(x.double() for x in work.inputs))
    y = y[0] if isinstance(y, tuple) else y
    return y if work.target is None else F.cross_entropy(y, work.target)


@torch.no_grad()
def baseline_of(work: Work) -> Tensor:
    case, module = work.case, copy.deepcopy(work.module)
    with torch.autocast(work.device.type, DTYPES[case.dtype], enabled=case.is_mixed):
        y = module(*work.inputs)
    y = y[0] if isinstance(y, tuple) else y
    return y if work.target is None else F.cross_entropy(y.float(), work.target)


def _row(
    job: Job,
    provider: str,
    state: str,
    reason: str,
    ceiling: Ceilings | None,
    error: float | None = None,
    baseline_error: float | None = None,
    found: Stats | None = None,
    peak: float | None = None,
    first: float | None = None,
    graph: bool = False,
) -> Row:
    case = job.case
    return Row(
        case=case.name,
        kind=case.kind,
        provider=provider,
        dtype=case.dtype,
        batch=case.batch,
        channels=case.channels,
        height=case.height,
        width=case.width,
        state=state,
        reason=reason,
        median_ms=found and found.median,
        p20_ms=found and found.p20,
        p80_ms=found and found.p80,
        rounds=found.rounds if found else 0,
        peak_mem_mb=peak,
        first_ms=first,
        graph=graph,
        flops=case.flops,
        bytes=case.bytes,
        ceiling_tflops=ceiling.tflops if ceiling else 0.0,
        ceiling_gbs=ceiling.gbs if ceiling else 0.0,
        max_err=error,
        baseline_err=baseline_error,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **vars(job.machine),
    )
