"""One case, measured: every provider's results checked against float64, those that pass timed, a row each."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import gc
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import clear_caches

from fastunet.parity import Parity, compare

from .cases import DTYPES, Case
from .providers import Provider, eager, settings
from .rows import Row
from .timing import Ceilings, Clock, Graph, capture, ceilings, interleave, stats
from .work import Call, Results, Work, make_work


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


@dataclass(frozen=True)
class Job:
    """One case to measure.

    Attributes:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        seconds: of timing, of plain calls and of graphs each. seed: of weights and inputs.
        without: (provider, graph) of what has killed a process before; it is not tried again.
    """

    case: Case
    providers: tuple[Provider, ...]
    device: str
    seconds: float
    seed: int
    machine: Machine
    without: frozenset[tuple[str, bool]] = frozenset()


class DeviceLost(Exception):
    """The CUDA context is gone, and every later call of this process would fail for it."""


@dataclass
class _Entry:
    """A provider whose results were right."""

    call: Call
    first_ms: float
    held_mb: float | None  # its weights, inputs and optimiser state
    parity: Parity


At = Callable[[str, bool], None]


def measure(job: Job, measured: dict[str, Ceilings], at: At) -> list[Row]:
    """The rows of one case.

    Args:
        measured: ceilings by dtype; filled here.
        at: called with a provider's name, and whether a graph is meant, before it runs.

    Raises:
        DeviceLost: a provider took the device with it.
    """
    torch._dynamo.reset()  # of the case before: compiled code has a limited number of versions
    try:
        with settings(job.case.dtype), own_caches() as folder:
            return _Measurement(job, measured, at, folder).rows()
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


class _Measurement:
    def __init__(self, job: Job, measured: dict[str, Ceilings], at: At, folder: Path) -> None:
        self.job, self.case, self.at, self.folder = job, job.case, at, folder
        self.clock = Clock(torch.device(job.device))
        dtype = job.case.dtype
        if dtype not in measured:
            wake(self.clock.device)
            measured[dtype] = ceilings(self.clock, DTYPES[dtype])
        self.ceiling = measured[dtype]
        self.work = make_work(self.case, self.clock.device, job.seed)
        self.truth = truth_of(self.work)
        try:
            self.baseline = baseline_of(self.work)
        except Exception as error:
            self.check_device(error)
            raise RuntimeError(f"no results of eager PyTorch to check others against, {reason_of(error)}") from error
        self.entries: dict[str, _Entry] = {}
        self.found: list[Row] = []

    def rows(self) -> list[Row]:
        for provider in self.job.providers:
            if (provider.name, False) not in self.job.without:
                self.check_first(provider)
        self.time()
        if self.clock.cuda:
            self.time({name: graph for name in self.entries if (graph := self.captured(name)) is not None})
        return self.found

    def check_first(self, provider: Provider) -> None:
        """Its first call, from its own empty caches; then its results."""
        name, clock = provider.name, self.clock
        self.at(name, False)
        try:
            forget_compiled(self.folder)
            before = clock.allocated_mb()
            (call, results), first_ms = clock.first(lambda: first_call(provider, self.work))
            after = clock.allocated_mb()
            held = None if after is None or before is None else after - before - size_mb(results)
            results = copied(results)
            parity = check(results, self.baseline, self.truth, self.case)
        except Exception as error:  # whatever a provider raises is its row
            self.failed(name, False, error)
        else:
            if parity.ok:
                self.entries[name] = _Entry(call, first_ms, held, parity)
            else:
                self.add(name, "wrong", False, parity, reason=str(parity))

    def captured(self, name: str) -> Graph | None:
        """The call's graph, if it can be captured and its replay is right."""
        if (name, True) in self.job.without:
            return None
        self.at(name, True)
        call = self.entries[name].call
        try:
            graph = capture(call)
            call.restart(self.work)
            for result in graph.results:
                result.fill_(torch.nan)  # a replay must write them all
            graph.replay()
            parity = check(graph.results, self.baseline, self.truth, self.case)
        except Exception as error:
            self.failed(name, True, error)
            return None
        if not parity.ok:
            self.add(name, "wrong", True, parity, reason=str(parity))
            return None
        return graph

    def time(self, graphs: dict[str, Graph] | None = None) -> None:
        """Interleaved rounds of the plain calls, or of graphs; a row each."""
        graph = graphs is not None
        calls: dict[str, Callable[[], object]] = {name: entry.call for name, entry in self.entries.items()}
        if graphs is not None:
            calls = {name: made.replay for name, made in graphs.items()}

        def failed(name: str, error: Exception) -> None:
            self.failed(name, graph, error)

        times = interleave(
            self.clock, calls, seconds=self.job.seconds, at=lambda name: self.at(name, graph), failed=failed
        )
        for name, some in times.items():
            entry, peak = self.entries[name], None
            self.at(name, graph)
            try:
                if entry.held_mb is not None:
                    peak = entry.held_mb + (graphs[name].pool_mb if graphs else self.clock.peak_mb(calls[name]))
            except Exception as error:
                failed(name, error)
                continue
            found, parity = stats(some), entry.parity
            self.add(
                name, "ok", graph, parity, median_ms=found.median, p20_ms=found.p20, p80_ms=found.p80,
                rounds=found.rounds, peak_mem_mb=peak, first_ms=entry.first_ms,
            )  # fmt: skip

    def failed(self, name: str, graph: bool, error: Exception) -> None:
        self.add(name, "failed", graph, reason=("cannot be captured, " if graph else "") + reason_of(error))
        self.check_device(error)

    def check_device(self, error: Exception) -> None:
        """Whether the device is still there, after an error.

        Raises:
            DeviceLost: it is not.
        """
        try:
            self.clock.synchronize()
        except Exception:
            raise DeviceLost(reason_of(error)) from error

    def add(self, provider: str, state: str, graph: bool, parity: Parity | None = None, **others: Any) -> None:
        if parity is not None:
            errors = {"max_err": parity.candidate_error, "baseline_err": parity.baseline_error}
            others |= {name: value if math.isfinite(value) else None for name, value in errors.items()}
        row = make_row(self.job, provider, state, graph=graph, **others)
        self.found.append(dataclasses.replace(row, ceiling_tflops=self.ceiling.tflops, ceiling_gbs=self.ceiling.gbs))


def make_row(job: Job, provider: str, state: str, **others: Any) -> Row:
    """A row of a job, without figures where ``others`` has none."""
    case = job.case
    nothing: dict[str, Any] = dict.fromkeys(
        ("median_ms", "p20_ms", "p80_ms", "peak_mem_mb", "first_ms", "max_err", "baseline_err")
    )
    shape = {name: getattr(case, name) for name in ("batch", "channels", "height", "width", "flops", "bytes")}
    fields: dict[str, Any] = nothing | {
        "reason": "",
        "rounds": 0,
        "graph": False,
        "ceiling_tflops": 0.0,
        "ceiling_gbs": 0.0,
    }
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    what: dict[str, Any] = {
        "case": case.name,
        "kind": case.kind,
        "dtype": case.dtype,
        "provider": provider,
        "state": state,
    }
    fields |= shape | what | vars(job.machine) | {"date": now} | others
    return Row(**fields)


def reason_of(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def first_call(provider: Provider, work: Work) -> tuple[Call, Results]:
    """All that comes between weights and a first result, preparing included."""
    call = provider.prepare(work)
    return call, call()


def size_mb(results: Results) -> float:
    return sum(y.untyped_storage().nbytes() for y in results) / 2**20


# --- what is right ---------------------------------------------------------------------------


#: Of a gradient's distance to float64 over its length: that of no gradient at all is 1.
MOST_OFF = 0.4


def check(results: Results, baseline: Results, truth: Results, case: Case) -> Parity:
    """Whether all results are right; the errors are those of the worst.

    Outputs go by :func:`fastunet.parity.compare`. Of a training step the loss and each gradient are
    compared by their distance to float64 over its length: at most twice eager's worst, plus 1%, and never
    more than ``MOST_OFF``. A ReLU that takes its other side at a rounding makes a closer rule a matter of
    luck (see NOTES.md); what this one is for is a backward pass that did not run, or not to its end.
    """
    shapes = [tuple(y.shape) for y in results]
    if shapes != [tuple(y.shape) for y in truth]:
        reason = f"shapes {shapes}, expected {[tuple(y.shape) for y in truth]}"
        return Parity(False, math.inf, math.nan, math.nan, reason)  # there is no distance
    if case.kind == "train":
        ours, theirs = (max(map(relative_error, some, truth)) for some in (results, baseline))
        limit = min(2 * theirs + 0.01, MOST_OFF)
        return Parity(ours <= limit, ours, theirs, limit, "relative L2, the worst of loss and gradients")
    tf32, stages = case.dtype == "tf32" and results[0].is_cuda, len(case.layers)
    found = [compare(*three, tf32=tf32, stages=stages) for three in zip(results, baseline, truth, strict=True)]
    return max(found, key=lambda parity: (not parity.ok, parity.candidate_error))


def relative_error(result: Tensor, truth: Tensor) -> float:
    """|result - truth| / |truth|; infinite for NaN."""
    error = ((result.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()
    return error if math.isfinite(error) else math.inf


def truth_of(work: Work) -> Results:
    """The results in float64."""
    module, inputs = copy.deepcopy(work.module).double(), tuple(x.double() for x in work.inputs)
    # Without a search for the quickest algorithm: nobody waits for float64 twice.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False), torch.set_grad_enabled(work.target is not None):
        y = module(*inputs)
        if work.target is None:
            return y if isinstance(y, tuple) else (y,)
        loss = F.cross_entropy(y, work.target)
        loss.backward(work.loss_scale().double())
    return loss.detach(), *(p.grad for p in module.parameters())  # pyright: ignore[reportReturnType]


def baseline_of(work: Work) -> Results:
    """Eager's results, made apart from those of the provider of that name, which may fail or not be asked for."""
    # Without cuDNN's search for algorithms, which it keeps: the first provider is to pay for its own.
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        return copied(eager(work)())
    finally:
        torch.backends.cudnn.benchmark = before


def copied(results: Results) -> Results:
    return tuple(y.detach().clone() for y in results)


# --- a fair start ----------------------------------------------------------------------------


@contextlib.contextmanager
def own_caches() -> Iterator[Path]:
    """A folder for compiled code, removed afterwards, in place of the user's, which may hold results of other days."""
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    try:
        with tempfile.TemporaryDirectory(prefix="fastunet-bench-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def forget_compiled(folder: Path) -> None:
    """Let the next provider compile what it needs itself, also what another has compiled before."""
    place = tempfile.mkdtemp(dir=folder)
    os.environ["TRITON_CACHE_DIR"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = place
    clear_caches()
    for name, module in list(sys.modules.items()):
        if name.startswith("fastunet.kernels"):
            for kernel in vars(module).values():
                if hasattr(kernel, "device_caches"):  # a triton.JITFunction
                    kernel.device_caches.clear()


def wake(device: torch.device) -> None:
    """Load what a process loads once, cuDNN above all, before the first provider would pay for it."""
    x = torch.randn(1, 8, 8, 8, device=device)
    conv = torch.nn.Conv2d(8, 8, 3, device=device)
    conv(x).sum().backward()
    torch.optim.AdamW(conv.parameters(), fused=True).step()
