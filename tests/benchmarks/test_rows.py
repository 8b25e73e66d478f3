"""Rows come back as they went, and whole."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from benchmarks import measure, rows

from .helpers import TIMED, TINY, job_of


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
        ({"median_ms": float("inf")}, "median_ms: expected a finite number, got inf"),
        ({"max_err": float("nan")}, "max_err: expected a finite number, got nan"),
        ({"peak_mem_mb": float("-inf")}, "peak_mem_mb: expected a finite number, got -inf"),
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


def test_a_number_beyond_floats_is_refused(row):
    line = json.dumps(dataclasses.asdict(row) | {"max_err": 0}).replace('"max_err": 0', '"max_err": 1e999')
    with pytest.raises(ValueError, match="max_err: expected a finite number, got inf"):
        rows.parse(line)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_row_is_written_that_would_be_refused(row, value, tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        rows.append(tmp_path / "a.jsonl", dataclasses.replace(row, max_err=value))
    assert not (tmp_path / "a.jsonl").exists()


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
