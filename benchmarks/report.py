"""Rows into what people look at: the README's table, a page that opens from disk, pictures."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastunet.files import atomic_write

from .charts import charts, is_ours, png, svg
from .rows import Row, latest

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"


@dataclass(frozen=True)
class Verdict:
    """One case: FastUNet beside the best competitor, both at their best of with and without a graph."""

    ours: Row
    best: Row

    @property
    def speed_up(self) -> float:
        assert self.ours.median_ms and self.best.median_ms
        return self.best.median_ms / self.ours.median_ms

    @property
    def word(self) -> str:
        """``"faster"``, ``"slower"``, or ``"even"`` where the spreads (p20 to p80) overlap."""
        ours, best = self.ours, self.best
        assert ours.p20_ms is not None and ours.p80_ms is not None
        assert best.p20_ms is not None and best.p80_ms is not None
        if ours.p80_ms < best.p20_ms:
            return "faster"
        return "slower" if ours.p20_ms > best.p80_ms else "even"


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """One for each case that both FastUNet and a competitor were timed on."""
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        if row.state == "ok":
            by_case.setdefault(row.case, []).append(row)
    found = []
    for some in by_case.values():
        ours = [row for row in some if row.provider == "fastunet"]
        others = [row for row in some if not is_ours(row)]
        if ours and others:
            quickest = [min(group, key=lambda row: row.median_ms or 0.0) for group in (ours, others)]
            found.append(Verdict(*quickest))
    return found


def _devices(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in latest(rows):
        where = row.device if row.peak_mem_mb is not None else f"{row.device}, {row.threads} threads"
        found.setdefault(where, []).append(row)
    return found


def _versions(rows: Sequence[Row]) -> str:
    newest = max(rows, key=lambda row: row.date)
    return f"PyTorch {newest.torch}, Triton {newest.triton}, commit {newest.commit}, {newest.date[:10]}"


# --- README ----------------------------------------------------------------------------------


def readme_table(rows: Iterable[Row]) -> str:
    """Markdown: for each device and each network, FastUNet beside the best competitor and eager."""
    parts = []
    for device, some in _devices(rows).items():
        eager = {row.case: row for row in some if row.provider == "eager" and not row.graph and row.state == "ok"}
        parts += [f"{device}; {_versions(some)}; medians of interleaved rounds in one run:", ""]
        parts += ["| case | eager | best competitor | FastUNet | against the best | error, ours / eager's |"]
        parts += ["|---|---|---|---|---|---|"]
        for v in verdicts(row for row in some if row.kind != "op"):
            plain = eager.get(v.ours.case)
            cells = (
                v.ours.case,
                f"{plain.median_ms:.1f} ms" if plain else "-",
                f"{_label(v.best)}, {v.best.median_ms:.1f} ms",
                f"{v.ours.median_ms:.1f} ms",
                f"{v.speed_up:.2f}x, {v.word}",
                f"{v.ours.max_err:.1e} / {v.ours.baseline_err:.1e}",
            )
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def _label(row: Row) -> str:
    return row.provider + (" (graph)" if row.graph else "")


def into_readme(readme: str, table: str) -> str:
    """The README's text with the table between its markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(readme)) != 1:
        raise ValueError(f"expected {BEGIN} and {END} once each in the README")
    return pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", readme)


# --- the page --------------------------------------------------------------------------------


STYLE = """
:root { color-scheme: light dark; --ground: #fdfdfc; --text: #1d2126; --soft: #6b7480; --line: #d9dce1; --good: #0a7d4f;
  --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --text: #e6e8eb; --soft: #98a1ad; --line: #333a43;
  --good: #5fd39b; --bad: #ff8a80; } }
body { background: var(--ground); color: var(--text); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 72rem; padding: 1rem; }
h1 { line-height: 1.2; } h2 { border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 1rem; }
p.soft, caption, footer { color: var(--soft); }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; white-space: nowrap; }
th { cursor: pointer; position: sticky; top: 0; background: var(--ground); user-select: none; }
th[aria-sort=ascending]::after { content: " \\2191"; } th[aria-sort=descending]::after { content: " \\2193"; }
td.number { text-align: right; } .faster { color: var(--good); } .slower, .wrong, .failed { color: var(--bad); }
figure { margin: 2rem 0; overflow-x: auto; } figure svg { height: auto; max-width: 100%; min-width: 30rem; }
figcaption { font-weight: 600; }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)], [p, q] = [parseFloat(x), parseFloat(y)];
      return (isNaN(p) || isNaN(q) ? x.localeCompare(y) : p - q) * (up ? 1 : -1);
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
  }));
}
"""


def page(rows: Sequence[Row]) -> str:
    """One HTML file without any external resource."""
    sections = [_section(device, some) for device, some in _devices(rows).items()]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>FastUNet: measured</title><style>{STYLE}</style></head>
<body><h1>FastUNet: measured</h1>
<p>Every output was checked against float64 before it was timed; what was wrong is listed and has no time. Rounds of all
providers are interleaved. "Best" is the fastest competitor of the same case, dtype and run; "even" means that the
middle 60% of the two timings overlap. Click a heading to sort.</p>
{"".join(sections) or "<p>No rows yet.</p>"}
<footer><p>Made by <code>fastunet report</code> from benchmarks/results/.</p></footer>
<script>{SCRIPT}</script></body></html>
"""


def _section(device: str, rows: Sequence[Row]) -> str:
    found = verdicts(rows)
    networks = [v for v in found if v.ours.kind != "op"]
    counts = {word: sum(v.word == word for v in found) for word in ("faster", "even", "slower")}
    head = f"<h2>{html.escape(device)}</h2><p class=soft>{html.escape(_versions(rows))}</p>"
    head += (
        f"<p>Of {len(found)} cases FastUNet is <b class=faster>faster than the best competitor in "
        f"{counts['faster']}</b>, even in {counts['even']}, <b class=slower>slower in {counts['slower']}</b>.</p>"
    )
    heads = ("case", "best competitor", "its ms", "FastUNet ms", "speed-up", "verdict", "error", "eager's error")
    verdict = _table("Networks", heads, [_verdict_cells(v) for v in networks]) if networks else ""
    figures = "".join(
        f"<figure><figcaption>{html.escape(title)}</figcaption>{svg(figure, title)}</figure>"
        for title, figure in charts(rows).items()
    )
    layers = [_verdict_cells(v) for v in found if v.ours.kind == "op"]
    per_layer = _table("Operators, one by one", heads, layers) if layers else ""
    return head + verdict + figures + per_layer + _all_rows(rows)


Cell = tuple[str, float | None, str]  # text, number to sort by, class


def _verdict_cells(v: Verdict) -> list[Cell]:
    return [
        (v.ours.case, None, ""),
        (_label(v.best), None, ""),
        _number(v.best.median_ms),
        _number(v.ours.median_ms),
        (f"{v.speed_up:.2f}x", v.speed_up, v.word),
        (v.word, None, v.word),
        _number(v.ours.max_err, "{:.1e}"),
        _number(v.ours.baseline_err, "{:.1e}"),
    ]


def _all_rows(rows: Sequence[Row]) -> str:
    heads = (
        "case", "provider", "state", "median ms", "p20", "p80", "TFLOP/s", "of ceiling", "GB/s", "MiB", "first ms",
        "error", "eager's error",
    )  # fmt: skip
    cells = [
        [
            (row.case, None, ""),
            (_label(row), None, ""),
            (row.state if row.state == "ok" else f"{row.state}: {row.reason}", None, row.state),
            _number(row.median_ms),
            _number(row.p20_ms),
            _number(row.p80_ms),
            _number(row.tflops),
            _number(row.tflops and row.ceiling_tflops and row.tflops / row.ceiling_tflops, "{:.0%}"),
            _number(row.gbs, "{:.1f}"),
            _number(row.peak_mem_mb, "{:.0f}"),
            _number(row.first_ms, "{:.0f}"),
            _number(row.max_err, "{:.1e}"),
            _number(row.baseline_err, "{:.1e}"),
        ]
        for row in rows
    ]
    return _table("Every row", heads, cells)


def _number(value: float | None, text: str = "{:.3f}") -> Cell:
    return ("-", -1.0, "number") if value is None else (text.format(value), value, "number")


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    def cell(text: str, value: float | None, kind: str) -> str:
        sort = "" if value is None else f' data-value="{value}"'
        return f'<td class="{kind}"{sort}>{html.escape(text)}</td>'

    body = "".join(f"<tr>{''.join(cell(*c) for c in row)}</tr>" for row in rows)
    top = "".join(f"<th scope=col>{html.escape(text)}</th>" for text in heads)
    table = f"<caption>{html.escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f"<div class=wide><table>{table}</table></div>"


def pictures(rows: Sequence[Row]) -> dict[str, bytes]:
    """PNG files by name, ``<device>-<chart>.png``."""
    found = {}
    for device, some in _devices(rows).items():
        for title, figure in charts(some).items():
            words = f"{device} {title.partition(':')[0]}".lower()
            found[re.sub(r"[^a-z0-9]+", "-", words).strip("-") + ".png"] = png(figure)
    return found


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """``index.html`` and the pictures into ``folder``; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"index.html": page(rows).encode()} | pictures(rows)
    for name, content in files.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(content)
    return [folder / name for name in files]
