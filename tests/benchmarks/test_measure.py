"""Nothing wrong is timed, and what fails is one row."""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from benchmarks import bench, measure, rows, timing, work
from benchmarks.cases import NETWORKS, Case, operators
from benchmarks.providers import Provider, eager
from benchmarks.work import Call, Results, Work, make_work
from fastunet.reference import UNet

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
    assert found["another shape"].max_err is None and "shapes [(1, 2, 8, 7)]" in found["another shape"].reason
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


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_training_step_is_its_gradients(dtype):
    def half(y: Results) -> Results:
        return *y[:-1], y[-1] / 2

    case = dataclasses.replace(TINY, kind="train", dtype=dtype)
    found = measured(case, *GOOD, Provider("none", without_backward), Provider("half", changed(half)))
    assert {name: row.state for name, row in found.items()} == {
        "eager": "ok", "fastunet": "ok", "none": "wrong", "half": "wrong",
    }  # fmt: skip
    assert found["half"].max_err == pytest.approx(0.5, rel=0.1)


# --- what only the right weights show -------------------------------------------------------------


def mutant(change: Callable[[UNet], object]) -> Callable[[Work], Call]:
    """Eager with its network changed."""

    def provider(work: Work) -> Call:
        module = copy.deepcopy(work.module)
        assert isinstance(module, UNet)
        change(module)
        return eager(dataclasses.replace(work, module=module))

    return provider


def without_bottleneck(unet: UNet) -> None:
    def zeros(module: torch.nn.Module, x: object, y: Any) -> torch.Tensor:
        return torch.zeros_like(y)

    unet.bottleneck.register_forward_hook(zeros)


def without_a_norm(name: str) -> Callable[[UNet], None]:
    return lambda unet: unet.set_submodule(name, torch.nn.Identity())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_network_without_its_bottleneck_is_wrong(dtype):
    case = Case("infer", "small", dtype, 1, 32, 32)
    found = measured(case, *GOOD, Provider("mutant", mutant(without_bottleneck)))
    assert {name: row.state for name, row in found.items()} == {"eager": "ok", "fastunet": "ok", "mutant": "wrong"}


def test_a_network_without_any_of_its_norms_is_wrong():
    case = Case("infer", "small-milesial", "bf16", 1, 32, 32, autocast=True)
    modules = make_work(case, torch.device("cpu"), 0).module.named_modules()
    norms = [name for name, module in modules if isinstance(module, torch.nn.BatchNorm2d)]
    found = measured(case, *GOOD, *(Provider(name, mutant(without_a_norm(name))) for name in norms))
    assert len(norms) == 18 and [found[provider.name].state for provider in GOOD] == ["ok", "ok"]
    assert {name: found[name].state for name in norms} == dict.fromkeys(norms, "wrong")


# --- training in fp16 ------------------------------------------------------------------------------


def test_gradients_of_many_pixels_do_not_underflow_in_fp16(monkeypatch):
    case = dataclasses.replace(TINY, kind="train", dtype="fp16", batch=4, height=256, width=256)

    def error() -> float:
        made = make_work(case, torch.device("cpu"), 0)
        return max(map(measure.relative_error, measure.baseline_of(made), measure.truth_of(made)))

    scaled = error()
    assert scaled < 0.02
    monkeypatch.setattr(work, "LOSS_SCALE", 1.0)
    assert error() > 5 * scaled


def test_no_gradient_at_all_never_passes():
    case = dataclasses.replace(TINY, kind="train")
    made = make_work(case, torch.device("cpu"), 0)
    truth = measure.truth_of(made)
    lost = (truth[0].float(), *(torch.zeros_like(y, dtype=torch.float32) for y in truth[1:]))
    infinite = tuple(torch.full_like(y, torch.inf) for y in lost)
    right = tuple(y.float() for y in truth)
    assert measure.check(right, right, truth, case).ok
    for baseline in (right, lost, infinite):
        assert not measure.check(lost, baseline, truth, case).ok


def test_infinite_errors_are_no_numbers_of_a_row(tmp_path):
    case = dataclasses.replace(TINY, kind="train")
    broken = Provider("broken", changed(lambda y: (y[0], *(g * torch.nan for g in y[1:]))))
    found = measured(case, GOOD[0], broken)["broken"]
    assert (found.state, found.max_err) == ("wrong", None) and "candidate error inf" in found.reason
    rows.append(tmp_path / "rows.jsonl", found)
    assert rows.read(tmp_path / "rows.jsonl") == [found]


# --- the baseline ----------------------------------------------------------------------------------


def test_an_eager_provider_that_fails_is_one_row():
    def broken(made: Work) -> Call:
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = measured(TINY, Provider("eager", broken), GOOD[1])
    assert {name: row.state for name, row in found.items()} == {"eager": "failed", "fastunet": "ok"}


def test_the_baseline_is_computed_once_and_its_failure_is_one_clear_reason(monkeypatch):
    calls = []

    def no_memory(made: Work) -> Call:
        calls.append(made)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure, "eager", no_memory)
    found = bench.measure_or_say_why(job_of(TINY, *GOOD), {}, lambda name, graph: None)
    assert {row.reason for row in found} == {
        "RuntimeError: no results of eager PyTorch to check others against, OutOfMemoryError: CUDA out of memory"
    }
    assert [row.provider for row in found] == ["eager", "fastunet"] and len(calls) == 1
    monkeypatch.setattr(measure, "Clock", LostDevice)
    with pytest.raises(measure.DeviceLost):
        bench.measure_or_say_why(job_of(TINY, *GOOD), {}, lambda name, graph: None)


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
        (
            provider.name,
            "failed",
            "the process died (SIGKILL), before any provider: at inputs, or the results to check against",
        )
        for provider in GOOD
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
