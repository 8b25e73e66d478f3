"""Measurements as append-only JSON lines: one row, one measurement, never edited."""

from __future__ import annotations

import dataclasses
import json
import math
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
        peak_mem_mb: MiB that the allocator held at most during a call, inputs and weights included;
            None on a CPU. first_ms: the first call, compiling and tuning included.
        flops, bytes: of the case, from its shapes: 2 x multiply-adds; each fused operator's inputs,
            weights and results once.
        ceiling_tflops, ceiling_gbs: a large matrix product and a large copy, in the same run.
        max_err, baseline_err: largest distance to float64, of this provider and of eager PyTorch.
        device, threads, torch, triton, cudnn, commit, date, run_id: where and when. ``threads`` counts on a CPU.
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
    def tflops(self) -> float | None:
        return None if self.median_ms is None else self.flops / self.median_ms * 1e-9

    @property
    def gbs(self) -> float | None:
        return None if self.median_ms is None else self.bytes / self.median_ms * 1e-6


class RowError(ValueError):
    """A malformed row; the message names the file and the line."""


def append(path: Path, row: Row) -> None:
    """Add one row in a single write, so that an interruption leaves whole rows only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(dataclasses.asdict(row)) + "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


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
        number = float in kinds and type(value) in (int, float) and math.isfinite(value)
        if type(value) not in kinds and not number:
            raise ValueError(f"{name}: expected {' or '.join(k.__name__ for k in kinds)}, got {value!r}")
    if values["kind"] not in KINDS or values["state"] not in STATES:
        raise ValueError(f"expected a kind of {KINDS} and a state of {STATES}")
    if (values["state"] == "ok") != (values["median_ms"] is not None):
        raise ValueError("median_ms: expected a time for a row that is ok, and none for another")
    return Row(**values)


def file_of(device: str) -> Path:
    """``results/nvidia-h200.jsonl`` for a device named ``NVIDIA H200``."""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".jsonl")


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each case, provider, device and kind of timing the newest row, in the order of the file."""
    newest: dict[tuple, Row] = {}
    for row in rows:
        key = (row.device, row.threads, *row.key)
        if key not in newest or row.date >= newest[key].date:
            newest[key] = row
    return list(newest.values())


@dataclass(frozen=True)
class Change:
    """One measurement against an earlier one; ``ratio`` above 1 is faster than before."""

    row: Row
    before: Row
    ratio: float
    real: bool


def changes(rows: Iterable[Row], before: Iterable[Row]) -> list[Change]:
    """Rows beside earlier ones of the same case, provider, graph, device and threads.

    A change is real only where the two spreads (p20 to p80) do not overlap.
    """
    earlier = {(row.device, row.threads, *row.key): row for row in latest(before) if row.state == "ok"}
    found = []
    for row in rows:
        old = earlier.get((row.device, row.threads, *row.key))
        if old is None or row.state != "ok":
            continue
        assert row.median_ms and row.p20_ms is not None and row.p80_ms is not None
        assert old.median_ms and old.p20_ms is not None and old.p80_ms is not None
        apart = row.p20_ms > old.p80_ms or row.p80_ms < old.p20_ms
        found.append(Change(row, old, old.median_ms / row.median_ms, apart))
    return found
