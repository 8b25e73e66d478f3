"""Nothing wrong is timed, and what fails is one row."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from benchmarks import bench, measure, timing
from benchmarks.cases import NETWORKS, Case, operators
from benchmarks.providers import Provider, eager
from benchmarks.work import Call, Results, Work

from .helpers import GOOD, TINY, job_of, measured


def changed(change: Callable[[Results], Results]) -> Callable[[Work], Call]:
    """Eager with its results changed."""

    def provider(work: Work) -> Call:
        right = eager(work)
        return Call(lambda: change(right()))

    return provider


def crashing(work: Work) -> Call:
    def call():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB\nmore")

    return Call(call)


def unprepared(work: Work) -> Call:
    raise TypeError("no such layer")


def late(work: Work) -> Call:
    """Fails once it is timed."""
    right, calls = eager(work), iter(range(3))
    return Call(lambda: (next(calls), right())[1])


def killed(work: Work) -> Call:
    return Call(lambda: os.kill(os.getpid(), signal.SIGSEGV))  # pyright: ignore[reportArgumentType, reportReturnType]


def without_backward(work: Work) -> Call:
    """The right loss, and gradients of nothing."""
    right = eager(work)
    return Call(lambda: (right()[0], *(torch.zeros_like(p) for p in work.module.parameters())))


def test_what_is_wrong_or_fails_is_one_row_and_the_rest_goes_on():
    bad = [
        Provider("wrong", changed(lambda y: (y[0] + 0.01,))),
        Provider("another shape", changed(lambda y: (y[0][..., 1:],))),
        *(Provider(f.__name__, f) for f in (crashing, unprepared, late)),
    ]
    job = job_of(TINY, GOOD[0], *bad, GOOD[1])
    seen: list[str] = []
    all_rows = measure.measure(job, {}, lambda name, graph: seen.append(name))
    found = {row.provider: row for row in all_rows}
    assert len(found) == len(all_rows) == 7
    assert seen[:7] == [provider.name for provider in job.providers]
    assert {name: row.state for name, row in found.items()} == {
        "eager": "ok", "fastunet": "ok", "wrong": "wrong", "another shape": "wrong",
        "crashing": "failed", "unprepared": "failed", "late": "failed",
    }  # fmt: skip
    assert found["wrong"].median_ms is None and "NO parity" in found["wrong"].reason
    assert found["wrong"].max_err == pytest.approx(0.01, rel=0.01)
    assert found["crashing"].reason == "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 TiB"
    assert found["unprepared"].reason == "TypeError: no such layer"
    assert found["late"].reason.startswith("StopIteration")
    assert found["eager"].rounds >= 5 and found["eager"].first_ms is not None


def test_a_wrong_pooled_map_is_wrong():
    (name,) = (n for n, layer in operators(NETWORKS["tiny"], 8, 8, 1).items() if layer.op == "conv2d_relu_pool")
    case = dataclasses.replace(TINY, kind="op", operator=name)
    found = measured(case, *GOOD, Provider("bad", changed(lambda y: (y[0], y[1] + 0.01))))
    assert {name: row.state for name, row in found.items()} == {"eager": "ok", "fastunet": "ok", "bad": "wrong"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_training_step_is_its_gradients(dtype):
    def half(y: Results) -> Results:
        return *y[:-1], y[-1] / 2

    case = dataclasses.replace(TINY, kind="train", dtype=dtype)
    found = measured(case, *GOOD, Provider("none", without_backward), Provider("half", changed(half)))
    assert {name: row.state for name, row in found.items()} == {
        "eager": "ok", "fastunet": "ok", "none": "wrong", "half": "wrong",
    }  # fmt: skip
    assert found["half"].max_err == pytest.approx(0.5, rel=0.1)


def test_whoever_takes_the_process_down_is_one_row_and_the_rest_goes_on():
    case = Case("infer", "small", "fp32", 1, 16, 16)  # the process knows no other of ours
    job = job_of(case, GOOD[0], Provider("killed", killed), GOOD[1])
    worker = bench.Worker(limit=300)
    try:
        found = {row.provider: row for row in worker.do(job)}
    finally:
        worker.stop()
    assert {name: row.state for name, row in found.items()} == {
        "eager": "ok", "killed": "failed", "fastunet": "ok",
    }  # fmt: skip
    assert found["killed"].reason == "the process died (SIGSEGV)"


class HungProcess:
    """A worker's process and its pipe: silent until it is killed."""

    exitcode, worker = 0, cast(bench.Worker, None)

    def send(self, job: measure.Job) -> None:
        worker, provider = self.worker, 1
        worker._place.value, worker._graph.value = provider, True

    def poll(self, seconds: float) -> bool:
        return self.exitcode < 0

    def recv(self) -> None:
        raise EOFError

    def kill(self) -> None:
        self.exitcode = -9

    def join(self) -> None:
        pass


def test_a_provider_that_hangs_is_a_row(monkeypatch):
    worker, job = bench.Worker(limit=-1), job_of(TINY, *GOOD)
    process: Any = HungProcess()
    process.worker = worker
    worker._process = worker._pipe = process
    assert worker._ask(job) == "no result within -1 s"
    answers = iter(["no result within -1 s", [measure.make_row(job, "eager", "failed")]])
    asked = []
    monkeypatch.setattr(worker, "_ask", lambda job: (asked.append(job.without), next(answers))[1])
    found = worker.do(job)
    assert [(row.provider, row.graph) for row in found] == [("eager", False), ("fastunet", True)]
    assert asked == [frozenset(), frozenset({("fastunet", True)})]


class LostDevice(timing.Clock):
    """A device that is gone once a provider has failed."""

    synchronized = 0

    def synchronize(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    def first(self, call):
        return call(), 1.0

    def allocated_mb(self) -> None:
        return None


def test_a_lost_device_ends_the_process_with_the_reason(monkeypatch):
    """On a poisoned CUDA context every later call would fail, so a new process must go on."""
    monkeypatch.setattr(measure, "Clock", LostDevice)
    with pytest.raises(measure.DeviceLost, match="OutOfMemoryError: CUDA out of memory"):
        bench.measure_or_say_why(job_of(TINY, GOOD[0], Provider("crashing", crashing)), {}, lambda name, graph: None)


def test_what_killed_a_process_is_not_tried_again():
    job = dataclasses.replace(job_of(TINY, Provider("killed", killed), GOOD[0]), without=frozenset({("killed", False)}))
    assert [row.provider for row in measure.measure(job, {}, lambda name, graph: None)] == ["eager"]


def test_a_process_that_dies_before_any_provider_is_a_row_for_each():
    worker = bench.Worker(limit=60)
    worker._ask = lambda job: "the process died (SIGKILL)"
    worker._place.value = -1
    found = worker.do(job_of(TINY, *GOOD))
    assert [(row.provider, row.state, row.reason) for row in found] == [
        (provider.name, "failed", "the process died (SIGKILL)") for provider in GOOD
    ]


def test_a_case_that_cannot_be_made_is_a_row_for_each_provider(monkeypatch):
    def no_memory(*_):
        raise MemoryError("9 TiB")

    monkeypatch.setattr(measure, "make_work", no_memory)
    found = bench.measure_or_say_why(job_of(TINY, *GOOD), {}, lambda name, graph: None)
    assert [(row.provider, row.state, row.reason) for row in found] == [
        ("eager", "failed", "MemoryError: 9 TiB"),
        ("fastunet", "failed", "MemoryError: 9 TiB"),
    ]
