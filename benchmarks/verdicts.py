"""FastUNet beside the best competitor: what the command prints last, and the report first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .providers import OURS
from .rows import Row

WORDS = ("faster", "even", "slower", "wrong", "failed")


@dataclass(frozen=True)
class Verdict:
    """One case in one run; FastUNet and the best competitor both at their best of with and without a graph."""

    ours: Row
    best: Row

    @property
    def speed_up(self) -> float | None:
        """None where FastUNet was wrong or failed."""
        assert self.best.median_ms
        return self.best.median_ms / self.ours.median_ms if self.ours.median_ms else None

    @property
    def word(self) -> str:
        """One of ``WORDS``; ``"even"`` where the spreads (p20 to p80) overlap."""
        ours, best = self.ours, self.best
        if ours.p20_ms is None or ours.p80_ms is None:
            return ours.state
        assert best.p20_ms is not None and best.p80_ms is not None
        if ours.p80_ms < best.p20_ms:
            return "faster"
        return "slower" if ours.p20_ms > best.p80_ms else "even"


def is_ours(row: Row) -> bool:
    """Whether a row is of FastUNet or of one of its steps."""
    return row.provider in OURS


def consistent(rows: Iterable[Row]) -> list[Row]:
    """Of each place and case the rows of one run.

    With FastUNet in it, of those the one with most competitors timed, of those the newest: a short run
    with a few competitors does not hide the strong ones that a longer run has met.
    """
    runs: dict[tuple, dict[str, list[Row]]] = {}
    for row in rows:
        runs.setdefault((row.place, row.case), {}).setdefault(row.run_id, []).append(row)

    def rank(run: list[Row]) -> tuple[int, str]:
        competitors = {row.provider for row in run if row.state == "ok" and not is_ours(row)}
        met = any(row.provider == "fastunet" for row in run)
        return len(competitors) if met else 0, max(row.date for row in run)

    return [row for by_run in runs.values() for row in max(by_run.values(), key=rank)]


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """One for each case of :func:`consistent` rows that FastUNet met and a competitor was timed on."""
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    found = []
    for some in by_case.values():
        ours = [row for row in some if row.provider == "fastunet"]
        others = [row for row in some if not is_ours(row) and row.state == "ok"]
        if ours and others:
            found.append(Verdict(_quickest(ours), _quickest(others)))
    return found


def _quickest(rows: list[Row]) -> Row:
    """The quickest timed row; one that says why there is none, if none was timed."""
    return min(rows, key=lambda row: row.median_ms or float("inf"))


def best_of(rows: Iterable[Row]) -> list[Row]:
    """Of each case and provider the quickest of with and without a graph, of those that were timed."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row.case, row.provider
        if row.state == "ok" and (key not in found or (row.median_ms or 0.0) < (found[key].median_ms or 0.0)):
            found[key] = row
    return list(found.values())


def range_of(found: list[Verdict]) -> str:
    """``"0.75x to 1.20x of the best competitor's speed"``; empty without a time."""
    ratios = [v.speed_up for v in found if v.speed_up is not None]
    return f"{min(ratios):.2f}x to {max(ratios):.2f}x of the best competitor's speed" if ratios else ""
