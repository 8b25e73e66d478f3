"""Fair and safe timing: rounds interleaved between providers, cold caches, medians.

Drift (clocks, heat, neighbours) hits all providers alike, because each round times every one of
them once. On CUDA a call is timed by events; before it the L2 cache is flushed, so that no provider
finds its weights there by luck. On a CPU by ``perf_counter``; its caches are small beside the maps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

STABLE = 0.05  # warmed up when the last calls differ by less than this share
WARMUP_CALLS = (2, 20)  # at least and at most
FLUSH_BYTES = 256 * 2**20  # several times the largest L2 (50 MB on Hopper)


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
    """Times single calls on a device."""

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

    def first(self, call: Callable[[], object]) -> float:
        """Milliseconds on the wall of a first call: compiling, tuning, allocating."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return (time.perf_counter() - start) * 1e3

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def peak_mb(self, call: Callable[[], object]) -> float | None:
        """MiB that torch's allocator held at most during a call; None on a CPU, which does not count."""
        if not self.cuda:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) / 2**20


def warm_up(clock: Clock, call: Callable[[], object]) -> float:
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
    clock: Clock, calls: dict[str, Callable[[], object]], *, seconds: float, rounds: tuple[int, int] = (5, 200)
) -> dict[str, Stats]:
    """Time all calls in rounds, each once a round, the order turned by one each time.

    Args:
        seconds: about how long all of it may take, warm-up not counted.
        rounds: at least and at most.
    """
    expected = sum(warm_up(clock, call) for call in calls.values()) / 1e3
    count = max(rounds[0], min(rounds[1], int(seconds / max(expected, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(count):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(clock(calls[name]))
    return {name: stats(values) for name, values in times.items()}


def capture(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of a call that has run before; replay it by calling the result.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches in this run: a large matrix product, a large copy (read and written bytes)."""

    tflops: float
    gbs: float


def ceilings(clock: Clock, dtype: torch.dtype) -> Ceilings:
    """Measure both; float32 on CUDA with tf32 as torch has it set."""
    side, elements = (8192, 2**28) if clock.cuda else (1024, 2**24)
    a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
    source = torch.ones(elements, dtype=torch.float32, device=clock.device)
    target = torch.empty_like(source)
    measured = interleave(
        clock, {"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}, seconds=1.0, rounds=(5, 30)
    )
    return Ceilings(2 * side**3 / measured["product"].median * 1e-9, 8 * elements / measured["copy"].median * 1e-6)
