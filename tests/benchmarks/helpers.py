"""A tiny case, and its rows."""

from __future__ import annotations

from typing import Any

from benchmarks import measure, rows
from benchmarks.cases import NETWORKS, Case
from benchmarks.providers import Provider, eager, fastunet
from fastunet.config import UNetConfig

NETWORKS["tiny"] = UNetConfig(features=(2, 3))
TINY = Case("infer", "tiny", "fp32", 1, 8, 8)
MACHINE = measure.Machine("a cpu", 2, "2.13.0", "3.7.1", "none", "abc1234", "0123456789ab")
TIMED: dict[str, Any] = {"median_ms": 2.0, "p20_ms": 1.9, "p80_ms": 2.2, "rounds": 7, "first_ms": 3.0, "max_err": 1e-6}
GOOD = [Provider("eager", eager), Provider("fastunet", fastunet)]


def job_of(case: Case, *providers: Provider) -> measure.Job:
    return measure.Job(case, providers, "cpu", 0.0, 0, MACHINE)


def measured(case: Case, *providers: Provider) -> dict[str, rows.Row]:
    """Rows by provider, of this process."""
    return {row.provider: row for row in measure.measure(job_of(case, *providers), {}, lambda name, graph: None)}
