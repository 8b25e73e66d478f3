"""``fastunet bench`` and ``fastunet report`` as their user meets them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench, measure, report, rows, timing
from benchmarks.cases import Case, cases, quick
from fastunet.cli import bench as bench_command

FIRST, SECOND = cases("cpu")[:2]
MACHINE = measure.Machine("a cpu", 2, "2.13.0", "3.7.1", "none", "abc1234", "0123456789ab")


def row(case: Case, provider: str, ms: float, spread: float = 0.1, graph: bool = False) -> rows.Row:
    """A row that was timed."""
    timed: dict[str, Any] = {
        "median_ms": ms,
        "p20_ms": ms - spread,
        "p80_ms": ms + spread,
        "rounds": 9,
        "first_ms": 5.0,
    }
    known: dict[str, Any] = {"max_err": 1e-6, "baseline_err": 2e-6, "ceiling_tflops": 1.0, "ceiling_gbs": 10.0}
    return measure.make_row(job_of(case), provider, "ok", graph=graph, **timed, **known)


def failed(case: Case, provider: str) -> rows.Row:
    """A row of a provider that ran out of memory."""
    return measure.make_row(job_of(case), provider, "failed", reason="OutOfMemoryError: CUDA out of memory")


def job_of(case: Case) -> measure.Job:
    return measure.Job(case, (), "cpu", 0.0, 0, MACHINE)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """measured(case, row, error, ...): what a run meets, one after another."""

    def script(*events: Case | rows.Row | type[BaseException]) -> None:
        def run(chosen, providers, device, *, on_case, **options) -> Iterator[rows.Row]:
            for event in events:
                if isinstance(event, Case):
                    on_case(event)
                elif isinstance(event, rows.Row):
                    yield event
                else:
                    raise event

        monkeypatch.setattr(bench, "run", run)

    return script


def test_a_real_run_from_timing_to_page(run, tmp_path, monkeypatch):
    # In this process, which has loaded all there is to load.
    monkeypatch.setattr(bench, "Worker", InProcess)
    monkeypatch.setattr(measure, "ceilings", lambda clock, dtype: timing.Ceilings(1.0, 2.0))
    out = tmp_path / "rows.jsonl"
    words = ("bench", "--cases", "op small head", "--quick", "--device", "cpu", "--out", out)
    shown = run(*words, "--providers", "eager", "fastunet")
    assert (shown.code, shown.err) == (0, ""), shown
    found = rows.read(out)
    assert [(r.case, r.provider, r.state) for r in found] == [
        ("op small head 64x64 b1 fp32", "eager", "ok"),
        ("op small head 64x64 b1 fp32", "fastunet", "ok"),
    ]
    assert all(r.rounds >= 5 and r.median_ms and r.first_ms and r.max_err is not None for r in found)
    assert "op small head 64x64 b1 fp32" in shown.out and f"2 rows in {out}" in shown.out
    page = run("report", "--rows", out, "--out", tmp_path / "page")
    assert page.code == 0 and str(tmp_path / "page" / "index.html") in page.out
    assert "Operators, one by one" in (tmp_path / "page" / "index.html").read_text()


class InProcess:
    def __init__(self, limit: float) -> None:
        pass

    def do(self, job: measure.Job) -> list[rows.Row]:
        return measure.measure(job, {}, lambda name, graph: None)

    def stop(self) -> None:
        pass


def test_rows_are_appended_and_printed(run, measured, tmp_path):
    out = tmp_path / "rows.jsonl"
    rows.append(out, row(FIRST, "eager", 9.0))
    measured(FIRST, row(FIRST, "eager", 4.0), row(FIRST, "fastunet", 2.0))
    shown = run("bench", "--cases", FIRST.name, "--device", "cpu", "--out", out)
    assert shown.code == 0
    assert [r.median_ms for r in rows.read(out)] == [9.0, 4.0, 2.0]
    (line,) = [line for line in shown.out.splitlines() if "fastunet" in line and "1.90..2.10" in line]
    last = shown.out.strip().splitlines()[-1]  # the verdict comes last
    assert last.split()[-7:] == ["eager", "4.00", "2.00", "2.00x", "1.0e-06", "2.0e-06", "faster"]


@pytest.mark.parametrize("loser, code", [("compile", 0), ("fastunet", 1), ("fastunet conv+relu", 1)])
def test_what_failed_is_a_row_and_our_own_an_exit_code(run, measured, loser, code, tmp_path):
    winners = [row(FIRST, name, 2.0) for name in ("eager", "fastunet") if name != loser]
    measured(FIRST, failed(FIRST, loser), *winners)
    shown = run("bench", "--device", "cpu", "--out", tmp_path / "rows.jsonl", "--cases", FIRST.name)
    assert shown.code == code
    assert "OutOfMemoryError: CUDA out of memory" in shown.out
    assert [r.state for r in rows.read(tmp_path / "rows.jsonl")] == ["failed", *("ok" for _ in winners)]
    if loser == "fastunet":
        assert "failed: OutOfMemoryError" in shown.out.strip().splitlines()[-1]


def test_interrupted_with_whole_rows(run, measured, tmp_path):
    measured(FIRST, row(FIRST, "eager", 4.0), SECOND, KeyboardInterrupt)
    shown = run("bench", "--device", "cpu", "--quick", "--out", tmp_path / "rows.jsonl")
    assert shown.code == 130
    assert "interrupted: these are the rows so far\n" in shown.out
    assert f"left out (5): {SECOND.name}, " in shown.out  # the interrupted one too
    assert [r.median_ms for r in rows.read(tmp_path / "rows.jsonl")] == [4.0]


def test_what_a_budget_leaves_out_is_said(run, measured, tmp_path):
    measured(FIRST, row(FIRST, "fastunet", 4.0))
    shown = run("bench", "--device", "cpu", "--quick", "--budget", "1", "--out", tmp_path / "rows.jsonl")
    left = [case.name for case in quick("cpu")[1:]]
    assert f"left out (5): {', '.join(left)}\n" in shown.out


def test_nothing_measured_is_not_success(run, measured, tmp_path):
    measured()
    assert run("bench", "--device", "cpu", "--out", tmp_path / "rows.jsonl").code == 1


def test_without_fastunet_it_says_so(run, measured, tmp_path):
    words = "bench", "--device", "cpu", "--cases", FIRST.name, "--out", tmp_path / "rows.jsonl"
    said = "no verdicts: 'fastunet' is not among the --providers"
    measured(FIRST, row(FIRST, "eager", 4.0))
    shown = run(*words, "--providers", "eager")
    assert shown.code == 0 and said in shown.out
    measured(FIRST, row(FIRST, "fastunet", 4.0))
    assert said not in run(*words, "--providers", "fastunet").out


def test_the_device_asked_for_is_the_one_measured(run, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(bench_command, "a_device", str)
    monkeypatch.setattr(bench, "run", lambda cases, providers, device, **options: seen.append(device) or iter(()))
    run("bench", "--device", "cuda:1", "--out", tmp_path / "rows.jsonl")
    assert seen == ["cuda:1"]


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    assert bench.this_machine("cpu").commit == bench.this_commit() != "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench.this_machine("cpu").commit == "unknown"


def test_a_cpu_has_no_cudnn(monkeypatch):
    monkeypatch.setattr(bench.torch.backends.cudnn, "version", lambda: 91000)  # of a PyTorch built for CUDA
    assert bench.this_machine("cpu").cudnn == "none"


def test_a_budget_starts_no_case_late(monkeypatch):
    class Worker(InProcess):
        def do(self, job):
            clock[0] += 10.0
            return [row(job.case, "eager", 1.0)]

    clock = [0.0]
    monkeypatch.setattr(bench.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(bench, "Worker", Worker)
    started: list[Case] = []
    chosen = cases("cpu")[:5]
    run = bench.run(chosen, ["eager"], "cpu", seconds=1, limit=9, budget=15, seed=0, on_case=started.append)
    assert [r.case for r in run] == [case.name for case in chosen[:2]]  # the second began at 10 s
    assert started == chosen[:2]


def test_a_worker_takes_its_device(monkeypatch):
    taken = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", taken.append, raising=False)
    for device in ("cpu", "cuda", "cuda:1"):
        bench.use(torch.device(device))
    assert taken == [1]


@pytest.mark.parametrize(
    "before, verdict", [(4.0, "faster"), (1.0, "SLOWER"), (2.15, "within the spread"), (None, "nothing to compare")]
)
def test_compare(run, measured, before, verdict, tmp_path):
    earlier, out = tmp_path / "earlier.jsonl", tmp_path / "rows.jsonl"
    rows.append(earlier, row(FIRST if before else SECOND, "fastunet", before or 1.0))
    measured(FIRST, row(FIRST, "fastunet", 2.0))
    shown = run("bench", "--device", "cpu", "--cases", FIRST.name, "--out", out, "--compare", earlier)
    assert shown.code == 0 and verdict in shown.out
    others = {"faster", "SLOWER", "within the spread", "nothing to compare"} - {verdict}
    assert not any(other in shown.out for other in others)


def test_compare_tells_graphs_and_what_is_no_longer_timed(run, measured, tmp_path):
    earlier = tmp_path / "earlier.jsonl"
    for old in (row(FIRST, "fastunet", 2.0), row(FIRST, "fastunet", 1.0, graph=True), row(FIRST, "eager", 1.0)):
        rows.append(earlier, old)
    measured(FIRST, row(FIRST, "fastunet", 2.0, graph=True), failed(FIRST, "eager"))
    words = "--device", "cpu", "--cases", FIRST.name, "--out", tmp_path / "rows.jsonl", "--compare", earlier
    lines = run("bench", *words).out.splitlines()
    assert [line for line in lines if "fastunet (graph)" in line and "SLOWER" in line and "0.50x" in line]
    assert [line for line in lines if "eager" in line and "now failed: OutOfMemoryError" in line]


@pytest.mark.parametrize(
    "words, message",
    [
        (("bench", "--cases", "no such"), "--cases: no case's name holds 'no such'"),
        (("bench", "--providers", "magic"), "--providers: expected some of 'eager'"),
        (
            ("bench", "--device", "cpu", "--quick", "--providers", "cudnn fused", "compile max-autotune"),
            "--providers: 'cudnn fused', 'compile max-autotune' serve none of the 6 cases on cpu",
        ),
        (("bench", "--budget", "0"), "expected a positive integer, got '0'"),
        (("bench", "--compare", "nowhere.jsonl"), "--compare: "),
        (("bench", "--compare", "bad.jsonl"), "bad.jsonl:1: "),
        (("bench", "--out", "."), "--out: cannot write . (Is a directory)"),
        (("bench", "--out", "plain.md/rows.jsonl"), "--out: cannot write plain.md/rows.jsonl ("),
        (("report", "--rows", "bad.jsonl"), "bad.jsonl:1: "),
        (("report", "--rows", "empty.jsonl"), "--rows: no rows in empty.jsonl"),
        (
            ("report", "--rows", "good.jsonl", "--readme", "plain.md", "--out", "page"),
            "--readme: expected <!-- figures",
        ),
        (("report", "--rows", "good.jsonl", "--out", "good.jsonl"), "--out: cannot write"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(run, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text("{}\n")
    Path("empty.jsonl").touch()
    Path("plain.md").write_text("no markers\n")
    rows.append(Path("good.jsonl"), row(FIRST, "fastunet", 2.0))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shown = run(*words)
    assert (shown.code, shown.out) == (2, ""), shown
    assert len(shown.errors) == 1 and message in shown.err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_readmes_table_is_written(run, tmp_path):
    path, readme = tmp_path / "rows.jsonl", tmp_path / "README.md"
    for r in (row(FIRST, "eager", 4.0), row(FIRST, "fastunet", 2.0)):
        rows.append(path, dataclasses.replace(r, date="2026-01-01T00:00:00+00:00"))
    readme.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    assert run("report", "--rows", path, "--out", tmp_path / "page", "--readme", readme).code == 0
    text = readme.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert f"| {FIRST.name} | 4.00 ms | eager, 4.00 ms | 2.00 ms | 2.00x, faster |" in text
