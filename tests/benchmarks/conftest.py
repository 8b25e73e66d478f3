"""Timings that end at once."""

from __future__ import annotations

import pytest

from benchmarks import measure, timing


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARMUP_CALLS", (2, 3))
    monkeypatch.setattr(measure, "ceilings", lambda clock, dtype: timing.Ceilings(1.0, 2.0))
