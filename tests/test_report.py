"""The report: verdicts, the README's table, and the page in a real browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import bench, report, rows, timing
from benchmarks.cases import Case

MACHINE = bench.Machine("a <fast> GPU", 2, "2.13.0", "3.7.1", "91000", "abc1234", "0123456789ab")
INFER, OP = Case("infer", "seed", "bf16", 1, 256, 256), Case("op", "seed", "bf16", 1, 256, 256, "downs.0.conv.net.2")


def row(case: Case, provider: str, ms: float | None, spread: float = 0.01, graph: bool = False, **others) -> rows.Row:
    job = bench.Job(case, (), "cuda", 0.0, 0, MACHINE)
    found = None if ms is None else timing.Stats(ms, ms * (1 - spread), ms * (1 + spread), 9)
    state = "ok" if ms is not None else "wrong"
    made = bench._row(
        job,
        provider,
        state,
        "" if ms else "NO parity <off>",
        timing.Ceilings(700, 4000),
        1e-3,
        2e-3,
        found,
        100,
        5,
        graph,
    )
    return dataclasses.replace(made, **others)


ROWS = [
    row(INFER, "eager", 4.0),
    row(INFER, "compile", 2.0),
    row(INFER, "compile", 1.6, graph=True),
    row(INFER, "fastunet conv+relu", 1.2),
    row(INFER, "fastunet", 1.0),
    row(INFER, "cudnn fused", None),
    row(OP, "eager", 0.1),
    row(OP, "fastunet", 0.3),
    row(dataclasses.replace(OP, batch=16), "eager channels_last", 1.0, 0.2),
    row(dataclasses.replace(OP, batch=16), "fastunet", 0.9, 0.2),
]


def test_verdicts_by_hand():
    found = report.verdicts(ROWS)
    assert [(v.best.provider, v.best.graph, v.ours.provider) for v in found] == [
        ("compile", True, "fastunet"), ("eager", False, "fastunet"), ("eager channels_last", False, "fastunet"),
    ]  # fmt: skip
    assert [v.speed_up for v in found] == pytest.approx([1.6, 1 / 3, 1 / 0.9])
    assert [v.word for v in found] == ["faster", "slower", "even"]


def test_the_newest_row_of_a_measurement_counts():
    later = dataclasses.replace(ROWS[4], median_ms=3.0, p20_ms=2.9, p80_ms=3.1, date="2999-01-01")
    assert report.verdicts(rows.latest([*ROWS, later]))[0].word == "slower"


def test_the_readmes_table_stands_between_its_markers():
    table = report.readme_table(ROWS)
    assert f"| {INFER.name} | 4.0 ms | compile (graph), 1.6 ms | 1.0 ms | 1.60x, faster | 1.0e-03 / 2.0e-03 |" in table
    assert OP.name not in table
    before = f"top\n{report.BEGIN}\nold\n{report.END}\nbottom\n"
    assert report.into_readme(before, table) == f"top\n{report.BEGIN}\n{table}\n{report.END}\nbottom\n"
    with pytest.raises(ValueError, match="once each"):
        report.into_readme("no markers", table)


def test_the_page_needs_nothing_else():
    text = report.page(ROWS)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", text)
    assert "@import" not in text and "url(http" not in text
    assert "a &lt;fast&gt; GPU" in text and "NO parity &lt;off&gt;" in text  # nothing from a row is markup
    assert "faster than the best competitor in 1" in text and "slower in 1" in text


def test_pictures_and_page_are_written(tmp_path):
    written = report.write(ROWS, tmp_path / "new" / "results")
    assert {path.suffix for path in written} == {".html", ".png"}
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width > 600
    assert len([path for path in written if path.suffix == ".png"]) == 5


def test_without_rows_the_page_says_so():
    assert "No rows yet." in report.page([])


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# What a reader would do, and what they would see, as text for the test.
PROBE = """
<script>
window.onload = () => {
  const table = document.querySelector("table"), heads = [...table.tHead.rows[0].cells];
  const column = heads.findIndex(head => head.textContent.includes("speed-up"));
  const all = [...document.querySelectorAll("table")].at(-1);
  const median = [...all.tHead.rows[0].cells].findIndex(head => head.textContent === "median ms");
  const read = () => [...all.tBodies[0].rows].map(row => row.cells[median].textContent).join(" ");
  all.tHead.rows[0].cells[median].click();
  const up = read();
  all.tHead.rows[0].cells[median].click();
  const charts = [...document.querySelectorAll("figure svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    return box.width > 200 && box.height > 100 && svg.querySelectorAll("path").length > 5;
  });
  const result = {up, down: read(), charts, errors: window.errors, wide: document.body.scrollWidth > innerWidth + 1};
  document.body.innerHTML = "<pre id=result>" + JSON.stringify(result) + "</pre>";
};
</script>
"""
CATCH = "<script>window.errors = []; window.addEventListener('error', e => errors.push(e.message));</script>"


@pytest.mark.skipif(CHROMIUM is None, reason="NO BROWSER: the page is not tested (install chromium)")
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desk"])
def test_the_page_in_a_browser(width, tmp_path: Path):
    path = tmp_path / "page.html"
    path.write_text(report.page(ROWS).replace("<head>", "<head>" + CATCH).replace("</body>", PROBE + "</body>"))
    assert CHROMIUM is not None
    quiet = "sandbox disable-gpu first-run disable-background-networking disable-component-update disable-sync"
    words = [f"--{word if word.startswith('disable') else f'no-{word}'}" for word in quiet.split()]
    words += ["--headless", "--enable-logging=stderr", f"--user-data-dir={tmp_path}/data", f"--window-size={width},900"]
    command = [CHROMIUM, *words, "--virtual-time-budget=5000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(found[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    assert result["errors"] == []
    assert "CONSOLE" not in done.stderr, done.stderr
    assert len(result["charts"]) == 5 and all(result["charts"])
    assert result["up"] == "- 0.100 0.300 0.900 1.000 1.000 1.200 1.600 2.000 4.000"
    assert result["down"] == "4.000 2.000 1.600 1.200 1.000 1.000 0.900 0.300 0.100 -"
    assert result["wide"] is False  # only tables and charts scroll sideways
