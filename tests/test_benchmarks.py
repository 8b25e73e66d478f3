"""The benchmark suite: statistics, rows, and that nothing wrong is timed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from functools import partial

import pytest
import torch

from benchmarks import bench, rows, timing
from benchmarks.cases import DTYPES, NETWORKS, Case, cases, operators
from benchmarks.providers import OURS, PROVIDERS, Call, Provider, Work, eager, fastunet, make_work
from fastunet import ops
from fastunet.config import UNetConfig

from .test_ops import Names

NETWORKS["tiny"] = UNetConfig(features=(2, 3))
TINY = Case("infer", "tiny", "fp32", 1, 8, 8)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARMUP_CALLS", (2, 3))
    monkeypatch.setattr(bench, "ceilings", lambda clock, dtype: timing.Ceilings(1.0, 2.0))


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
    assert all(stats.rounds == 4 for stats in found.values())


def test_warm_up_ends_when_two_calls_agree():
    times = iter([9.0, 5.0, 1.0, 1.01, 7.0])

    class Clock:
        def __call__(self, call):
            return next(times)

    before, timing.WARMUP_CALLS = timing.WARMUP_CALLS, (2, 20)
    try:
        assert timing.warm_up(Clock(), lambda: None) == 1.01  # pyright: ignore[reportArgumentType]
    finally:
        timing.WARMUP_CALLS = before


# --- rows ------------------------------------------------------------------------------------


@pytest.fixture
def row() -> rows.Row:
    job = bench.Job(TINY, (), "cpu", 0.0, 0, MACHINE)
    return bench._row(
        job, "eager", "ok", "", timing.Ceilings(1.0, 2.0), 1e-6, 1e-6, timing.Stats(2.0, 1.9, 2.2, 7), None, 3.0
    )


MACHINE = bench.Machine("a cpu", 2, "2.13.0", "3.7.1", "none", "abc1234", "0123456789ab")


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
    assert (faster.ratio, faster.real) == (2.0, True)
    assert same.real is False
    assert (slower.ratio, slower.real) == (0.5, True)
    assert rows.changes([at(1.0, 0.1)], [at(2.0, 0.1, device="another")]) == []
    newest = rows.changes([at(1.0, 0.1)], [at(2.0, 0.1), at(3.0, 0.1, date="2999-01-01")])
    assert newest[0].before.median_ms == 3.0


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


def test_layers_of_one_shape_are_one_operator():
    found = operators(NETWORKS["seed"], 256, 256, 1)
    shapes = [(layer.op, layer.in_shapes, layer.out_shape) for layer in found.values()]
    assert len(set(shapes)) == len(shapes)


# --- nothing wrong is timed ------------------------------------------------------------------


def wrong(work: Work) -> Call:
    right = eager(work)
    return lambda: right() + 0.01


def another_shape(work: Work) -> Call:
    right = eager(work)
    return lambda: right()[..., 1:]


def crashing(work: Work) -> Call:
    def call():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB\nmore")

    return call


def unprepared(work: Work) -> Call:
    raise TypeError("no such layer")


def killed(work: Work) -> Call:
    return lambda: os.kill(os.getpid(), signal.SIGSEGV)  # pyright: ignore[reportReturnType]


GOOD = [Provider("eager", eager), Provider("fastunet", fastunet)]


def test_what_is_wrong_or_fails_is_one_row_and_the_rest_goes_on():
    bad = [Provider(f.__name__, f) for f in (wrong, another_shape, crashing, unprepared)]
    job = bench.Job(TINY, (GOOD[0], *bad, GOOD[1]), "cpu", 0.0, 0, MACHINE)
    seen: list[str] = []
    found = {row.provider: row for row in bench.measure(job, {}, seen.append)}
    assert seen == ["eager", "wrong", "another_shape", "crashing", "unprepared", "fastunet"]
    assert {name: row.state for name, row in found.items()} == {
        "eager": "ok", "fastunet": "ok", "wrong": "wrong", "another_shape": "wrong",
        "crashing": "failed", "unprepared": "failed",
    }  # fmt: skip
    assert found["wrong"].median_ms is None and "NO parity" in found["wrong"].reason
    assert found["wrong"].max_err == pytest.approx(0.01, rel=0.01)
    assert found["crashing"].reason == "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 TiB"
    assert found["unprepared"].reason == "TypeError: no such layer"
    assert found["eager"].rounds >= 5 and found["eager"].first_ms is not None


def test_a_provider_that_kills_the_process_is_one_row_and_the_rest_goes_on():
    case = Case("infer", "small", "fp32", 1, 16, 16)  # the process that takes over knows no other of ours
    job = bench.Job(case, (GOOD[0], Provider("killed", killed), GOOD[1]), "cpu", 0.0, 0, MACHINE)
    worker = bench._Worker()
    try:
        found = {row.provider: row for row in worker.do(job)}
    finally:
        worker.stop()
    assert {name: row.state for name, row in found.items()} == {"eager": "ok", "killed": "failed", "fastunet": "ok"}
    assert found["killed"].reason == "the process died (SIGSEGV)"


def test_a_case_that_cannot_be_made_is_a_row_for_each_provider(monkeypatch):
    def no_memory(*_):
        raise MemoryError("9 TiB")

    monkeypatch.setattr(bench, "make_work", no_memory)
    found = bench.measure_or_say_why(bench.Job(TINY, tuple(GOOD), "cpu", 0.0, 0, MACHINE), {}, print)
    assert [(row.provider, row.state, row.reason) for row in found] == [
        ("eager", "failed", "MemoryError: 9 TiB"),
        ("fastunet", "failed", "MemoryError: 9 TiB"),
    ]


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
        job = bench.Job(case, (provider,), "cpu", 0.0, 0, MACHINE)
        (row,) = bench.measure(job, {}, lambda name: None)
        assert row.state == "ok", row
        assert row.max_err is not None and row.max_err < 1e-5


@pytest.mark.parametrize("provider", GOOD, ids=lambda p: p.name)
def test_autocast_keeps_float32_weights(provider):
    case = dataclasses.replace(TINY, dtype="bf16", autocast=True)
    work = make_work(case, torch.device("cpu"), 0)
    assert {p.dtype for p in work.module.parameters()} == {torch.float32}
    assert provider.prepare(work)().dtype == torch.bfloat16
    (row,) = bench.measure(bench.Job(case, (provider,), "cpu", 0.0, 0, MACHINE), {}, lambda name: None)
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
        losses = [step().item() for _ in range(40)]
        assert losses[-1] < losses[0]


def test_work_is_the_same_for_the_same_seed():
    one, two = (make_work(TINY, torch.device("cpu"), 3) for _ in range(2))
    assert torch.equal(one.inputs[0], two.inputs[0])
    assert all(torch.equal(a, b) for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True))
    assert one.inputs[0].dtype == DTYPES[TINY.dtype]
