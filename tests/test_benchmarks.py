"""The benchmark suite: statistics, rows, and that nothing wrong is timed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

import pytest
import torch

from benchmarks import bench, measure, rows, timing
from benchmarks.cases import DTYPES, NETWORKS, Case, cases, operators, quick
from benchmarks.providers import OURS, PROVIDERS, Provider, eager, fastunet, settings
from benchmarks.work import Call, Results, Work, make_work
from fastunet import kernels, ops
from fastunet.config import UNetConfig

from .test_ops import Names

NETWORKS["tiny"] = UNetConfig(features=(2, 3))
TINY = Case("infer", "tiny", "fp32", 1, 8, 8)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARMUP_CALLS", (2, 3))
    monkeypatch.setattr(measure, "ceilings", lambda clock, dtype: timing.Ceilings(1.0, 2.0))


def job_of(case: Case, *providers: Provider) -> measure.Job:
    return measure.Job(case, providers, "cpu", 0.0, 0, MACHINE)


def measured(case: Case, *providers: Provider) -> dict[str, rows.Row]:
    """Rows by provider, of this process."""
    return {row.provider: row for row in measure.measure(job_of(case, *providers), {}, lambda name, graph: None)}


# --- statistics ------------------------------------------------------------------------------


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


# --- rows ------------------------------------------------------------------------------------


MACHINE = measure.Machine("a cpu", 2, "2.13.0", "3.7.1", "none", "abc1234", "0123456789ab")
TIMED: dict[str, Any] = {"median_ms": 2.0, "p20_ms": 1.9, "p80_ms": 2.2, "rounds": 7, "first_ms": 3.0, "max_err": 1e-6}


@pytest.fixture
def row() -> rows.Row:
    return measure.make_row(
        job_of(TINY), "eager", "ok", baseline_err=1e-6, ceiling_tflops=1.0, ceiling_gbs=2.0, **TIMED
    )


def test_rows_come_back_as_they_went(row, tmp_path):
    path = tmp_path / "results" / "a.jsonl"
    other = dataclasses.replace(row, provider="fastunet", median_ms=None, state="failed", reason="boom\nbang")
    rows.append(path, row)
    rows.append(path, other)
    assert rows.read(path) == rows.read(path.parent) == [row, other]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"median_ms": "3"}, "median_ms: expected float or NoneType, got '3'"),
        ({"median_ms": True}, "median_ms: expected"),
        ({"batch": 1.5}, "batch: expected int, got 1.5"),
        ({"median_ms": None}, "median_ms: expected a time for a row that is ok"),
        ({"state": "wrong"}, "median_ms: expected a time for a row that is ok, and none for another"),
        ({"kind": "guess"}, "expected a kind of"),
        ({"novel": 1}, "novel: not a field of a row"),
        ({"bytes": 0}, "bytes: expected at least 1, got 0"),
        ({"flops": -1}, "flops: expected at least 0, got -1"),
        ({"median_ms": 0.0}, "expected 0 < p20_ms <= median_ms <= p80_ms"),
        ({"p20_ms": 2.1}, "expected 0 < p20_ms <= median_ms <= p80_ms, got 2.1, 2.0, 2.2"),
        ({"first_ms": None}, "first_ms: expected a number for a row that is ok"),
    ],
)
def test_a_malformed_row_is_refused_with_its_line(row, change, message, tmp_path):
    path = tmp_path / "a.jsonl"
    rows.append(path, row)
    with path.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(row) | change) + "\n")
    with pytest.raises(rows.RowError) as error:
        rows.read(path)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)


@pytest.mark.parametrize("line", ["", "{", "3", '{"case": "x"}', '{"median_ms": NaN}'])
def test_what_is_no_row_is_refused_with_its_line(line, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(rows.RowError, match=r"a\.jsonl:1: "):
        rows.read(path)


def test_a_torn_line_does_not_take_the_next_row_with_it(row, tmp_path):
    path = tmp_path / "a.jsonl"
    rows.append(path, row)
    path.write_bytes(path.read_bytes() * 2 + b'{"case": "infer s')
    rows.append(path, row)
    torn = path.read_text().splitlines()
    assert len(torn) == 4 and rows.parse(torn[3]) == row
    with pytest.raises(rows.RowError, match=r"a\.jsonl:3: "):
        rows.read(path)


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0"), (0.00123, "0.00123"), (0.999, "0.999"), (2.0, "2.00"), (12.34, "12.3"), (1234.5, "1234")],
)
def test_three_significant_digits(value, text):
    assert rows.digits(value) == text


def test_the_share_is_of_the_nearer_ceiling(row):
    ceilings: dict[str, Any] = {"ceiling_tflops": 10.0, "ceiling_gbs": 100.0, "median_ms": 1.0}
    bound = dataclasses.replace(row, flops=10**9, bytes=50 * 10**6, **ceilings)  # 1 TFLOP/s, 50 GB/s
    assert bound.share == pytest.approx(0.5)
    assert dataclasses.replace(bound, flops=9 * 10**9).share == pytest.approx(0.9)
    assert dataclasses.replace(bound, ceiling_gbs=0.0).share is None


def test_every_field_of_the_contract_is_there():
    wanted = (
        "case kind provider dtype batch channels height width median_ms p20_ms p80_ms peak_mem_mb first_ms graph "
        "flops bytes ceiling_tflops ceiling_gbs max_err baseline_err device torch triton cudnn commit date run_id"
    )
    assert set(wanted.split()) <= {field.name for field in dataclasses.fields(rows.Row)}


def test_a_change_counts_only_beyond_both_spreads(row):
    def at(median, spread, **others):
        return dataclasses.replace(row, median_ms=median, p20_ms=median - spread, p80_ms=median + spread, **others)

    faster, same, slower = (rows.changes([at(m, 0.1)], [at(2.0, 0.1)])[0] for m in (1.0, 1.9, 4.0))
    assert (faster.ratio, faster.word) == (2.0, "faster")
    assert same.word == "within the spread"
    assert (slower.ratio, slower.word) == (0.5, "SLOWER")
    assert rows.changes([at(1.0, 0.1)], [at(2.0, 0.1, device="another")]) == []
    newest = rows.changes([at(1.0, 0.1)], [at(2.0, 0.1), at(3.0, 0.1, date="2999-01-01")])
    assert newest[0].before.median_ms == 3.0
    broken = dataclasses.replace(row, state="failed", reason="boom", median_ms=None)
    (lost,) = rows.changes([broken], [at(1.0, 0.1), dataclasses.replace(broken, date="2999-01-01")])
    assert (lost.ratio, lost.word) == (None, "now failed: boom")


# --- cases -----------------------------------------------------------------------------------


def test_the_cases_of_the_suite():
    names = [case.name for case in cases("cuda")]
    assert len(set(names)) == len(names)
    for size, batch in ((256, 1), (256, 16), (512, 1), (512, 8), (1024, 1)):
        for dtype in ("fp16", "bf16", "tf32"):
            assert f"infer seed {size}x{size} b{batch} {dtype}" in names
    for network in ("milesial-bilinear", "milesial-transpose"):
        assert f"infer {network} 256x256 b16 bf16" in names
    assert "infer pytorch_unet 640x959 b1 fp16 autocast" in names
    assert "train seed 256x256 b16 bf16" in names and "train seed 512x512 b4 bf16" in names
    for operator in ("downs.0.conv.net.0", "head", "ups.3.concat", "ups.3.conv.net.0"):
        assert f"op seed {operator} 512x512 b16 fp32" in names
    assert "op seed-transpose ups.0.up 256x256 b1 fp16" in names


def test_flops_and_bytes_by_hand():
    case = Case("op", "seed", "bf16", 2, 256, 256, "downs.0.conv.net.2")
    assert case.flops == 2 * 9 * 64 * 64 * 2 * 256 * 256
    maps = 2 * 64 * 256 * 256 * (1 + 1 + 1 / 4)
    assert case.bytes == 2 * (maps + 9 * 64 * 64 + 64)
    assert Case("train", "seed", "bf16", 2, 256, 256).flops == 3 * Case("infer", "seed", "bf16", 2, 256, 256).flops
    # The tutorial's network at 256x256, from the table of floors: 111 GFLOP.
    assert Case("infer", "seed", "bf16", 1, 256, 256).flops / 1e9 == pytest.approx(111, abs=1)


def test_every_operator_counts_its_bytes():
    concat = Case("op", "seed", "bf16", 2, 256, 256, "ups.3.concat")
    x, skip = 2 * 128 * 128 * 128, 2 * 64 * 256 * 256
    assert (concat.flops, concat.bytes) == (0, 2 * (x + skip + 4 * x + skip))
    assert all(case.bytes > 0 for case in cases("cuda"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_quick_is_a_few_of_all(device):
    chosen, everything = quick(device), cases(device)
    assert all(case in everything for case in chosen) and len(set(chosen)) == len(chosen) <= 12
    assert {case.kind for case in chosen} == ({"op", "infer", "train"} if device == "cuda" else {"infer"})


def test_layers_of_one_shape_are_one_operator():
    found = operators(NETWORKS["seed"], 256, 256, 1)
    shapes = [(layer.op, layer.in_shapes, layer.out_shape) for layer in found.values()]
    assert len(set(shapes)) == len(shapes)


# --- nothing wrong is timed ------------------------------------------------------------------


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


GOOD = [Provider("eager", eager), Provider("fastunet", fastunet)]


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


# --- what torch.compile would do behind our back ----------------------------------------------


def traced(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Compile without Inductor, which takes seconds; returns whether each graph was to be frozen."""
    compiled, frozen = torch.compile, []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        frozen.append(torch._dynamo.utils.is_parameter_freezing())
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compiled(function, backend=backend, dynamic=False)
    )
    return frozen


COMPILE = {provider.name: provider for provider in PROVIDERS if provider.name.startswith("compile")}


def test_a_function_compiled_too_often_is_a_failure(monkeypatch):
    """Dynamo would go on in eager, which would then be timed as compiled."""
    traced(monkeypatch)

    def restless(work: Work) -> Call:
        run: Any = torch.compile(work.module)
        sizes = [torch.zeros(1, 1, side, side) for side in range(8, 17)]
        return Call(lambda: tuple(run(x) for x in sizes))

    row = measured(TINY, GOOD[0], Provider("restless", restless))["restless"]
    assert row.state == "failed" and "recompile" in row.reason.lower()


def test_every_case_compiles_anew(monkeypatch):
    graphs = traced(monkeypatch)
    for side in range(8, 17):  # nine, of one code object, which holds eight versions
        found = measured(dataclasses.replace(TINY, height=side), GOOD[0], COMPILE["compile"])
        assert found["compile"].state == "ok"
    assert len(graphs) == 9


@pytest.mark.parametrize("kind", ["infer", "train"])
@pytest.mark.parametrize("name", COMPILE)
def test_max_autotune_freezes_weights_in_inference(kind, name, monkeypatch):
    torch._dynamo.reset()
    frozen = traced(monkeypatch)
    work = make_work(dataclasses.replace(TINY, kind=kind), torch.device("cpu"), 0)
    with settings("fp32"):
        call = COMPILE[name].prepare(work)
        call()
        call()
    assert frozen == [kind == "infer" and name != "compile"]  # and the second call compiled nothing


# --- the providers -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["infer", "train", "op"])
@pytest.mark.parametrize(
    "provider", [p for p in PROVIDERS if p.serves(TINY, "cpu") and p.name != "compile"], ids=lambda p: p.name
)
def test_every_provider_computes_the_case(kind, provider):
    names = operators(NETWORKS["tiny"], 8, 8, 1) if kind == "op" else [None]
    for name in names:
        case = dataclasses.replace(TINY, kind=kind, operator=name)
        if not provider.serves(case, "cpu"):
            continue
        (row,) = measured(case, provider).values()
        assert row.state == "ok", row
        assert row.max_err is not None and row.max_err < 1e-5


@pytest.mark.parametrize("provider", GOOD, ids=lambda p: p.name)
def test_autocast_keeps_float32_weights(provider):
    case = dataclasses.replace(TINY, dtype="bf16", autocast=True)
    work = make_work(case, torch.device("cpu"), 0)
    assert {p.dtype for p in work.module.parameters()} == {torch.float32}
    assert provider.prepare(work)()[0].dtype == torch.bfloat16
    (row,) = measured(case, provider).values()
    assert row.state == "ok" and row.case.endswith(" bf16 autocast")


def test_each_rung_fuses_one_operator_more():
    found = []
    for provider in (p for p in PROVIDERS if p.name in OURS):
        call = provider.prepare(make_work(TINY, torch.device("cpu"), 0))
        with ops.watched(), Names() as names:
            call()
        found.append({name for name in names.seen if name.startswith("fastunet::")})
    conv, pool, concat, fused = (f"fastunet::{name}" for name in OPERATORS)
    assert found == [{conv}, {conv, pool}, {conv, pool, concat}, {conv, pool, fused}]


OPERATORS = ("conv2d_relu", "conv2d_relu_pool", "upsample_concat", "upsample_concat_conv2d_relu")


def test_training_steps_train():
    case = dataclasses.replace(TINY, kind="train")
    for provider in GOOD:
        step = provider.prepare(make_work(case, torch.device("cpu"), 0))
        losses = [step()[0].item() for _ in range(40)]
        assert losses[-1] < losses[0]


def test_a_restarted_step_begins_with_the_first_weights():
    work = make_work(dataclasses.replace(TINY, kind="train"), torch.device("cpu"), 0)
    step = fastunet(work)
    first = measure.copied(step())
    step()
    step.restart(work)
    assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_every_provider_compiles_for_itself(monkeypatch, tmp_path):
    class Kernel:
        device_caches: ClassVar = {"cuda:0": "compiled"}

    monkeypatch.setattr(kernels.conv3x3, "a_kernel", Kernel(), raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "theirs")
    with measure.own_caches() as folder:
        measure.forget_compiled(folder)
        one = os.environ["TRITON_CACHE_DIR"]
        measure.forget_compiled(folder)
        two = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert one != two and not os.path.exists(one)
    assert os.environ["TRITON_CACHE_DIR"] == "theirs" and Kernel.device_caches == {}


def test_cudnn_fused_takes_a_stem_of_few_channels(monkeypatch):
    """cuDNN has no engine for it; the CPU, which has no such operator, shows who is asked."""
    asked = []

    def fused(x, weight, bias, *_):
        asked.append(x.shape[1])
        return torch.relu_(torch.nn.functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2))

    monkeypatch.setattr(torch, "cudnn_convolution_relu", fused)
    monkeypatch.setitem(NETWORKS, "tiny", UNetConfig(features=(8, 9)))
    (provider,) = (provider for provider in PROVIDERS if provider.name == "cudnn fused")
    assert measured(TINY, GOOD[0], provider)["cudnn fused"].state == "ok"
    assert set(asked) == {8, 9, 17}


def test_work_is_the_same_for_the_same_seed():
    one, two = (make_work(TINY, torch.device("cpu"), 3) for _ in range(2))
    assert torch.equal(one.inputs[0], two.inputs[0])
    assert all(torch.equal(a, b) for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True))
    assert one.inputs[0].dtype == DTYPES[TINY.dtype]
