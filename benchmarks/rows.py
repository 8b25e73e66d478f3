"""Measurements as append-only JSON lines: one row, one measurement, never edited."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
KINDS = ("op", "infer", "train")
STATES = ("ok", "wrong", "failed")  # timed; output broke the parity rule, not timed; raised or died, not timed


@dataclass(frozen=True)
class Row:
    """One provider on one case.

    Attributes:
        case, kind, dtype, batch, channels, height, width: what was computed; ``channels`` in words.
        provider: who computed it. graph: replayed from a captured CUDA graph.
        state, reason: one of ``STATES``; what was seen, where it is not ``"ok"``.
        median_ms, p20_ms, p80_ms, rounds: of the timed calls; None if not timed.
        peak_mem_mb: MiB of the provider alone: its weights, inputs and optimiser state, and at most
            during a call what comes on top (of a graph, its pool); None on a CPU.
        first_ms: from weights to a first result, with compiling and tuning, in a process where
            PyTorch has run before and no code is compiled yet.
        flops, bytes: of the case, from its shapes: 2 x multiply-adds; each fused operator's inputs,
            weights and results once.
        ceiling_tflops, ceiling_gbs: a large matrix product and a large copy, in the same run.
        max_err, baseline_err: largest distance to float64, of this provider and of eager PyTorch; of a
            training step the relative L2 one, of the worst of loss and gradients.
        device, threads, torch, triton, cudnn, commit, date, run_id: where and when. On a CPU ``cudnn`` is
            ``"none"``, and ``threads`` counts.
    """

    case: str
    kind: str
    provider: str
    dtype: str
    batch: int
    channels: str
    height: int
    width: int
    state: str
    reason: str
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    rounds: int
    peak_mem_mb: float | None
    first_ms: float | None
    graph: bool
    flops: int
    bytes: int
    ceiling_tflops: float
    ceiling_gbs: float
    max_err: float | None
    baseline_err: float | None
    device: str
    threads: int
    torch: str
    triton: str
    cudnn: str
    commit: str
    date: str
    run_id: str

    @property
    def key(self) -> tuple[str, str, bool]:
        """What must agree for two rows to be of the same measurement on different days."""
        return self.case, self.provider, self.graph

    @property
    def place(self) -> str:
        """The device; of a CPU its threads too. Those of a GPU's host make no other measurement."""
        return f"{self.device}, {self.threads} threads" if self.is_cpu else self.device

    @property
    def is_cpu(self) -> bool:
        return self.cudnn == "none"

    @property
    def label(self) -> str:
        return self.provider + (" (graph)" if self.graph else "")

    @property
    def tflops(self) -> float | None:
        return None if self.median_ms is None else self.flops / self.median_ms * 1e-9

    @property
    def gbs(self) -> float | None:
        return None if self.median_ms is None else self.bytes / self.median_ms * 1e-6

    @property
    def share(self) -> float | None:
        """Of the ceiling that is nearer: the matrix product's flops or the copy's bytes."""
        if self.tflops is None or self.gbs is None or not self.ceiling_tflops or not self.ceiling_gbs:
            return None
        return max(self.tflops / self.ceiling_tflops, self.gbs / self.ceiling_gbs)


class RowError(ValueError):
    """A malformed row; the message names the file and the line."""


def append(path: Path, row: Row) -> None:
    """Add one row in a single write, so that an interruption leaves whole rows only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(dataclasses.asdict(row), allow_nan=False) + "\n"
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a line that was torn stays apart from this one
                line = "\n" + line
        file.write(line.encode())


def check_writable(path: Path) -> None:
    """Whether :func:`append` can write there; what it makes for that is removed again.

    Raises:
        OSError: it cannot.
    """
    there = path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("ab").close()
    if not there:
        path.unlink()


def read(path: Path) -> list[Row]:
    """All rows of a file, or of every file of a folder.

    Raises:
        RowError: names the file, the line and what is wrong with it.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [row for file in files for row in _read_file(file)]


def _read_file(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RowError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            yield parse(line)
        except ValueError as error:
            raise RowError(f"{path}:{number}: {error}") from None


_TYPES = typing.get_type_hints(Row)


def parse(line: str) -> Row:
    """One row from its line.

    Raises:
        ValueError: says what was expected.
    """
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError(f"expected an object, got {type(values).__name__}")
    for name in _TYPES.keys() - values.keys():
        raise ValueError(f"{name}: missing")
    for name, value in values.items():
        if name not in _TYPES:
            raise ValueError(f"{name}: not a field of a row")
        kinds = typing.get_args(_TYPES[name]) or (_TYPES[name],)
        number = type(value) in (int, float)
        if type(value) not in kinds and not (float in kinds and number):
            raise ValueError(f"{name}: expected {' or '.join(k.__name__ for k in kinds)}, got {value!r}")
        if number and not abs(value) < math.inf:  # json reads NaN, Infinity, and 1e999 as infinite
            raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if values["kind"] not in KINDS or values["state"] not in STATES:
        raise ValueError(f"expected a kind of {KINDS} and a state of {STATES}")
    if (values["state"] == "ok") != (values["median_ms"] is not None):
        raise ValueError("median_ms: expected a time for a row that is ok, and none for another")
    row = Row(**values)
    _check_ranges(row)
    return row


def _check_ranges(row: Row) -> None:
    for name in ("batch", "height", "width", "bytes", "threads"):
        if getattr(row, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(row, name)}")
    for name in ("flops", "ceiling_tflops", "ceiling_gbs", "rounds"):
        if getattr(row, name) < 0:
            raise ValueError(f"{name}: expected at least 0, got {getattr(row, name)}")
    if row.state == "ok":
        for name in ("p20_ms", "p80_ms", "first_ms", "max_err", "baseline_err"):
            if getattr(row, name) is None:
                raise ValueError(f"{name}: expected a number for a row that is ok")
        assert row.median_ms is not None and row.p20_ms is not None and row.p80_ms is not None
        if not 0 < row.p20_ms <= row.median_ms <= row.p80_ms:
            raise ValueError(
                f"median_ms: expected 0 < p20_ms <= median_ms <= p80_ms, "
                f"got {row.p20_ms}, {row.median_ms}, {row.p80_ms}"
            )


def file_of(device: str) -> Path:
    """``results/nvidia-h200.jsonl`` for a device named ``NVIDIA H200``."""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".jsonl")


def digits(value: float) -> str:
    """Three significant ones: ``digits(0.01234)`` is ``"0.0123"``, ``digits(1234)`` is ``"1234"``."""
    places = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(places, 0)}f}"


@dataclass(frozen=True)
class Change:
    """One measurement beside an earlier one; ``ratio`` above 1 is faster than before, None no longer timed."""

    row: Row
    before: Row
    ratio: float | None
    word: str


def changes(rows: Iterable[Row], before: Iterable[Row]) -> list[Change]:
    """Rows beside the newest timed ones of the same case, provider, graph and place.

    A change counts only where the two spreads (p20 to p80) do not overlap.
    """
    earlier: dict[tuple, Row] = {}
    for row in before:
        key = (row.place, *row.key)
        if row.state == "ok" and (key not in earlier or row.date >= earlier[key].date):
            earlier[key] = row
    found = []
    for row in rows:
        old = earlier.get((row.place, *row.key))
        if old is None:
            continue
        if row.state != "ok":
            found.append(Change(row, old, None, f"now {row.state}: {row.reason}"))
            continue
        assert row.median_ms and row.p20_ms is not None and row.p80_ms is not None
        assert old.median_ms and old.p20_ms is not None and old.p80_ms is not None
        apart = row.p20_ms > old.p80_ms or row.p80_ms < old.p20_ms
        ratio = old.median_ms / row.median_ms
        found.append(Change(row, old, ratio, "within the spread" if not apart else "faster" if ratio > 1 else "SLOWER"))
    return found
