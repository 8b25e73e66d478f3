"""Statistics of timings, and their order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from benchmarks import timing


@pytest.mark.parametrize(
    "times, median, p20, p80",
    [
        ([5.0], 5, 5, 5),
        ([1.0, 3.0], 2, 1.4, 2.6),
        ([5.0, 1.0, 4.0, 2.0, 3.0], 3, 1.8, 4.2),
        ([float(n) for n in range(101)], 50, 20, 80),
        ([1.0] * 9 + [100.0], 1, 1, 1),
    ],
)
def test_statistics_by_hand(times, median, p20, p80):
    found = timing.stats(times)
    assert (found.median, found.p20, found.p80) == pytest.approx((median, p20, p80))
    assert found.rounds == len(times)


def test_rounds_are_interleaved_and_turned():
    clock, order = timing.Clock(torch.device("cpu")), []
    calls: dict[str, Callable[[], object]] = {name: partial(order.append, name) for name in "abc"}
    found = timing.interleave(clock, calls, seconds=0, rounds=(4, 4))
    timed = order[-12:]
    assert [timed[i : i + 3] for i in range(0, 12, 3)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert all(len(times) == 4 for times in found.values())
    assert timing.interleave(clock, {}, seconds=0) == {}


def test_a_call_that_raises_while_it_is_timed_is_left_out():
    left, said = iter(range(4)), []
    calls: dict[str, Callable[[], object]] = {"late": lambda: next(left), "good": lambda: None}

    def failed(name: str, error: Exception) -> None:
        said.append((name, type(error)))

    found = timing.interleave(timing.Clock(torch.device("cpu")), calls, seconds=0, failed=failed)
    assert set(found) == {"good"} and len(found["good"]) == 5
    assert said == [("late", StopIteration)]


def test_warm_up_ends_when_two_calls_agree(monkeypatch):
    times = iter([9.0, 5.0, 1.0, 1.01, 7.0])
    monkeypatch.setattr(timing, "WARMUP_CALLS", (2, 20))
    assert timing.warm_up(lambda call: next(times), lambda: None) == 1.01
