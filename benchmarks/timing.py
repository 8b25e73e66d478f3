"""Fair and safe timing: rounds interleaved between providers, cold caches, medians.

Drift (clocks, heat, neighbours) hits all providers alike, because each round times every one of
them once. On CUDA a call is timed by events; before it the L2 cache is flushed, so that no provider
finds its weights there by luck. On a CPU by ``perf_counter``; its caches are left as they are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

STABLE = 0.05  # warmed up when the last calls differ by less than this share
WARMUP_CALLS = (2, 20)  # at least and at most
FLUSH_BYTES = 256 * 2**20  # several times the largest L2 (50 MB on Hopper)

T = TypeVar("T")


@dataclass(frozen=True)
class Stats:
    """Milliseconds: the median, and the 20th and 80th percentiles that most calls lie between."""

    median: float
    p20: float
    p80: float
    rounds: int


def stats(times: list[float]) -> Stats:
    """Of at least one time; percentiles interpolate linearly between neighbours."""
    ordered = sorted(times)

    def percentile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Stats(statistics.median(ordered), percentile(0.2), percentile(0.8), len(ordered))


class Clock:
    """Times single calls on a device, and counts what they allocate."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.cuda else None

    def __call__(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call, caches flushed before it."""
        if self._flush is None:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def first(self, call: Callable[[], T]) -> tuple[T, float]:
        """A first call's result, and its milliseconds on the wall: compiling, tuning, allocating."""
        self.synchronize()
        start = time.perf_counter()
        result = call()
        self.synchronize()
        return result, (time.perf_counter() - start) * 1e3

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def allocated_mb(self) -> float | None:
        """MiB that live tensors hold; None on a CPU, where nobody counts."""
        self.synchronize()
        return torch.cuda.memory_allocated(self.device) / 2**20 if self.cuda else None

    def peak_mb(self, call: Callable[[], object]) -> float:
        """MiB that torch's allocator holds at most during a call, above what it held before. CUDA alone."""
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


def warm_up(clock: Callable[[Any], float], call: Callable[[], object]) -> float:
    """Call until two times agree; returns the last, in milliseconds."""
    least, most = WARMUP_CALLS
    last = clock(call)
    for number in range(1, most):
        now = clock(call)
        if number + 1 >= least and abs(now - last) <= STABLE * last:
            return now
        last = now
    return last


def interleave(
    clock: Callable[[Any], float],
    calls: dict[str, Callable[[], object]],
    *,
    seconds: float,
    rounds: tuple[int, int] = (5, 200),
    at: Callable[[str], None] = lambda name: None,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Time all calls in rounds, each once a round, the order turned by one each time.

    Args:
        seconds: about how long all of it may take, warm-up not counted.
        rounds: at least and at most.
        at: called before each call with its name.
        failed: called with the name of a call that raises; it is left out from then on, and of the
            result. By default the exception leaves.

    Returns:
        Milliseconds by name, one a round.
    """
    left = dict(calls)
    times: dict[str, list[float]] = {name: [] for name in calls}

    def attempt(name: str, action: Callable[[Any], float]) -> float:
        at(name)
        try:
            return action(left[name])
        except Exception as error:
            if failed is None:
                raise
            del left[name]
            failed(name, error)
            return 0.0

    expected = sum(attempt(name, lambda call: warm_up(clock, call)) for name in calls) / 1e3
    count = max(rounds[0], min(rounds[1], int(seconds / max(expected, 1e-6))))
    for turn in range(count):
        names = list(left)
        start = turn % max(len(names), 1)
        for name in names[start:] + names[:start]:
            times[name].append(attempt(name, clock))
    return {name: times[name] for name in left}


@dataclass(frozen=True)
class Graph:
    """A captured call: ``replay`` it, and find its results in the same tensors each time."""

    replay: Callable[[], None]
    results: tuple[torch.Tensor, ...]
    pool_mb: float  # MiB of the memory it keeps to itself


def capture(call: Callable[[], tuple[torch.Tensor, ...]]) -> Graph:
    """A CUDA graph of a call that has run before.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # as capturing does, so that the pool alone makes the difference
    before = torch.cuda.memory_reserved()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # by default one of the device that was captured on first
        results = call()
    return Graph(graph.replay, results, (torch.cuda.memory_reserved() - before) / 2**20)


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches in this run: a large matrix product, a large copy (read and written bytes)."""

    tflops: float
    gbs: float


def ceilings(clock: Clock, dtype: torch.dtype) -> Ceilings:
    """Measure both, the best of many; float32 on CUDA with tf32 as torch has it set.

    On a CPU the product is float32's for every dtype: without instructions for a 16-bit one, its own
    product is hundreds of times slower than its convolutions, and no ceiling.
    """
    side, elements = (8192, 2**28) if clock.cuda else (2048, 2**25)
    a, b = (torch.randn(side, side, device=clock.device).to(dtype if clock.cuda else torch.float32) for _ in range(2))
    source = torch.ones(elements, dtype=torch.float32, device=clock.device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}
    best = {name: min(times) for name, times in interleave(clock, calls, seconds=1.0, rounds=(5, 30)).items()}
    return Ceilings(2 * side**3 / best["product"] * 1e-9, 8 * elements / best["copy"] * 1e-6)
