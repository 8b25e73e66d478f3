"""Rows into what people look at: the README's table, a page that opens from disk, pictures."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastunet.files import atomic_write

from .charts import charts, png, svg
from .rows import Row, digits
from .verdicts import WORDS, Verdict, consistent, range_of, verdicts

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"


def _devices(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """:func:`consistent` rows by place, GPUs first."""
    found: dict[str, list[Row]] = {}
    for row in sorted(consistent(rows), key=lambda row: row.is_cpu):
        found.setdefault(row.place, []).append(row)
    return found


def _runs(rows: Iterable[Row]) -> list[list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.run_id, []).append(row)
    return list(found.values())


def _versions(run: Sequence[Row]) -> str:
    """Of the rows of one run."""
    newest = max(run, key=lambda row: row.date)
    return f"PyTorch {newest.torch}, Triton {newest.triton}, commit {newest.commit}, {newest.date[:10]}"


# --- README ----------------------------------------------------------------------------------


def readme_table(rows: Iterable[Row]) -> str:
    """Markdown: for each device, run and network, FastUNet beside the best competitor and eager."""
    parts = []
    devices = _devices(row for row in rows if row.kind != "op")
    for device, some in ((device, run) for device, found in devices.items() for run in _runs(found)):
        eager = {row.case: row for row in some if row.provider == "eager" and not row.graph and row.state == "ok"}
        parts += [f"{device}; {_versions(some)}; medians of interleaved rounds in one run:", ""]
        parts += ["| case | eager | best competitor | FastUNet | against the best | error, ours / eager's |"]
        parts += ["|---|---|---|---|---|---|"]
        for v in verdicts(some):
            plain = eager.get(v.ours.case)
            timed = v.speed_up is not None
            cells = (
                v.ours.case,
                _ms(plain),
                f"{v.best.label}, {_ms(v.best)}",
                _ms(v.ours),
                f"{v.speed_up:.2f}x, {v.word}" if timed else f"{v.word}: {v.ours.reason}".replace("|", "/"),
                f"{v.ours.max_err:.1e} / {v.ours.baseline_err:.1e}" if timed else "-",
            )
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def _ms(row: Row | None) -> str:
    return "-" if row is None or row.median_ms is None else f"{digits(row.median_ms)} ms"


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
th { background: var(--ground); }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--soft); }
th[aria-sort=ascending]::after { content: " \\2191"; } th[aria-sort=descending]::after { content: " \\2193"; }
th.number, td.number { text-align: right; } td:first-child { white-space: normal; min-width: 7rem; }
td.reason { max-width: 24rem; white-space: normal; }
.faster { color: var(--good); } .slower, .wrong, .failed { color: var(--bad); }
figure { margin: 2rem 0; overflow-x: auto; } figure svg { height: auto; max-width: 100%; min-width: 34rem; }
figcaption { font-weight: 600; }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const text = row => row.cells[column].textContent;
    const number = row => text(row) === "-" ? -Infinity : parseFloat(text(row));
    const order = (a, b) => (up ? 1 : -1) *
      (head.className ? number(a) - number(b) || 0 : text(a).localeCompare(text(b), "en", {numeric: true}));
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
<p>Every output was checked against float64 before it was timed. Click a heading to sort.</p>
{"".join(sections) or "<p>No rows yet.</p>"}
<h2>How it was measured</h2>
<p>What was wrong is listed and has no time. Rounds of all providers are interleaved, and each comparison is within one
run. "Best" is the fastest competitor of the same case and dtype, with or without a CUDA graph; "even" means that the
middle 60% of the two timings overlap.</p>
<p>Errors are the largest distances to float64; of training steps, relative ones of the worst gradient. The first result
comes from a process where PyTorch has run before, with nothing compiled yet; what cuDNN has tuned for an earlier
provider stays tuned. "Of ceiling" is the nearer of two: flops of a large matrix product, bytes of a large copy, both
measured in the run. (On a CPU small maps stay in its caches, which are faster than that copy, and the product is
float32's for every dtype.) Peak memory is that of the provider alone.</p>
<footer><p>Made by <code>fastunet report</code> from benchmarks/results/.</p></footer>
<script>{SCRIPT}</script></body></html>
"""


def _section(device: str, rows: Sequence[Row]) -> str:
    found = verdicts(rows)
    networks = [v for v in found if v.ours.kind != "op"]
    versions = "<br>".join(html.escape(_versions(run)) for run in _runs(rows))
    head = f"<h2>{html.escape(device)}</h2><p class=soft>{versions}</p>{_sentence(found)}"
    heads = (
        "case", "speed-up#", "verdict", "best competitor", "its ms#", "FastUNet ms#", "error#", "eager's error#",
        "commit",
    )  # fmt: skip
    verdict = _table("Networks", heads, [_verdict_cells(v) for v in networks]) if networks else ""
    figures = "".join(
        f"<figure><figcaption>{html.escape(title)}</figcaption>{svg(figure, title)}</figure>"
        for title, figure in charts(rows).items()
    )
    layers = [_verdict_cells(v) for v in found if v.ours.kind == "op"]
    per_layer = _table("Operators, one by one", heads, layers) if layers else ""
    return head + verdict + figures + per_layer + _all_rows(rows)


def _sentence(found: Sequence[Verdict]) -> str:
    counts = {word: sum(v.word == word for v in found) for word in WORDS}
    said = [
        f"<b class={word}>{word} in {count}</b>" if count else f"{word} in none"
        for word, count in counts.items()
        if count or word in WORDS[:3]
    ]
    spread = range_of(list(found))
    return f"<p>Of {len(found)} cases FastUNet is {', '.join(said)}{f': {spread}' if spread else ''}.</p>"


Cell = tuple[str, str]  # text, class


def _verdict_cells(v: Verdict) -> list[Cell]:
    timed = v.speed_up is not None
    return [
        (v.ours.case, ""),
        (_text(v.speed_up, "{:.2f}x"), f"number {v.word}"),
        (v.word if timed else f"{v.word}: {v.ours.reason}", f"reason {v.word}"),
        (v.best.label, ""),
        _number(v.best.median_ms),
        _number(v.ours.median_ms),
        _number(v.ours.max_err, "{:.1e}"),
        _number(v.ours.baseline_err, "{:.1e}"),
        (v.ours.commit, ""),
    ]


def _all_rows(rows: Sequence[Row]) -> str:
    heads = (
        "case", "provider", "state", "median ms#", "p20#", "p80#", "TFLOP/s#", "GB/s#", "of ceiling#", "MiB#",
        "first ms#", "error#", "eager's error#",
    )  # fmt: skip
    cells = [
        [
            (row.case, ""),
            (row.label, ""),
            ("ok", "") if row.state == "ok" else (f"{row.state}: {row.reason}", f"reason {row.state}"),
            *map(_number, (row.median_ms, row.p20_ms, row.p80_ms, row.tflops, row.gbs)),
            _number(row.share, "{:.0%}"),
            _number(row.peak_mem_mb, "{:.0f}"),
            _number(row.first_ms, "{:.0f}"),
            _number(row.max_err, "{:.1e}"),
            _number(row.baseline_err, "{:.1e}"),
        ]
        for row in rows
    ]
    return f"<details><summary>Every row ({len(rows)})</summary>{_table('Every row', heads, cells)}</details>"


def _text(value: float | None, text: str | None) -> str:
    if value is None:
        return "-"
    return digits(value) if text is None else text.format(value)


def _number(value: float | None, text: str | None = None) -> Cell:
    return _text(value, text), "number"


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Headings that end in ``#`` are of numbers."""

    def head(text: str) -> str:
        kind = " class=number" if text.endswith("#") else ""
        return f"<th scope=col{kind}><button>{html.escape(text.rstrip('#'))}</button></th>"

    def cell(text: str, kind: str) -> str:
        return f'<td class="{kind}">{html.escape(text)}</td>' if kind else f"<td>{html.escape(text)}</td>"

    body = "".join(f"<tr>{''.join(cell(*c) for c in row)}</tr>" for row in rows)
    top = "".join(map(head, heads))
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
