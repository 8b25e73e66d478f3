"""The report: verdicts, the README's table, and the page in a real browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import charts, measure, report, rows, verdicts
from benchmarks.cases import Case

ROOT = Path(__file__).parents[2]
MACHINE = measure.Machine("a <fast> GPU", 2, "2.13.0", "3.7.1", "91000", "abc1234", "0123456789ab")
INFER, OP = Case("infer", "seed", "bf16", 1, 256, 256), Case("op", "seed", "bf16", 1, 256, 256, "downs.0.conv.net.2")


def row(case: Case, provider: str, ms: float | None, spread: float = 0.01, graph: bool = False, **others) -> rows.Row:
    job = measure.Job(case, (), "cuda", 0.0, 0, MACHINE)
    known: dict[str, Any] = {
        "graph": graph,
        "ceiling_tflops": 700.0,
        "ceiling_gbs": 4000.0,
        "max_err": 1e-3,
        "baseline_err": 2e-3,
    }
    if ms is None:
        return measure.make_row(job, provider, "wrong", reason="NO parity <off>", **known | others)
    known |= {"median_ms": ms, "p20_ms": ms * (1 - spread), "p80_ms": ms * (1 + spread), "rounds": 9}
    return measure.make_row(job, provider, "ok", peak_mem_mb=100.0, first_ms=5.0, **known | others)


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
    found = verdicts.verdicts(ROWS)
    assert [(v.best.provider, v.best.graph, v.ours.provider) for v in found] == [
        ("compile", True, "fastunet"), ("eager", False, "fastunet"), ("eager channels_last", False, "fastunet"),
    ]  # fmt: skip
    assert [v.speed_up for v in found] == pytest.approx([1.6, 1 / 3, 1 / 0.9])
    assert [v.word for v in found] == ["faster", "slower", "even"]


def test_a_later_run_with_fewer_competitors_does_not_hide_the_strong_ones():
    full = [row(INFER, name, ms) for name, ms in (("eager", 4.0), ("compile", 2.0), ("fastunet", 3.0))]
    later: Any = {"run_id": "quick", "date": "2999-01-01"}
    short = [row(INFER, "eager", 4.0, **later), row(INFER, "fastunet", 3.0, **later)]
    graphs = [row(INFER, "eager", 4.0, graph=True, **later)]  # no other competitor
    assert verdicts.consistent([*full, *short, *graphs]) == full
    again = [dataclasses.replace(r, **later) for r in full]
    assert verdicts.consistent([*full, *again]) == again


def test_threads_part_the_runs_of_a_cpu_and_not_those_of_a_gpu():
    old = [row(INFER, "eager", 4.0), row(INFER, "fastunet", 3.0)]
    new = [dataclasses.replace(r, threads=9, run_id="new", date="2999-01-01") for r in old]
    assert verdicts.consistent([*old, *new]) == new
    assert [change.before for change in rows.changes(new, old)] == old
    old, new = ([dataclasses.replace(r, cudnn="none") for r in some] for some in (old, new))
    assert verdicts.consistent([*old, *new]) == [*old, *new]
    assert rows.changes(new, old) == []
    assert list(report._devices([*old, *new])) == ["a <fast> GPU, 2 threads", "a <fast> GPU, 9 threads"]


def test_each_verdict_says_the_commit_of_its_run():
    other = Case("infer", "seed", "bf16", 16, 256, 256)
    second: Any = {"run_id": "second", "commit": "def5678"}
    some = [row(INFER, "eager", 4.0), row(INFER, "fastunet", 2.0)]
    some += [row(other, "eager", 8.0, **second), row(other, "fastunet", 4.0, **second)]
    one, two = report.readme_table(some).split("a <fast> GPU; ")[1:]
    assert "commit abc1234" in one and INFER.name in one and other.name not in one
    assert "commit def5678" in two and other.name in two and INFER.name not in two
    text = report.page(some)
    assert "commit abc1234" in text and "commit def5678" in text
    lines = re.findall(r"<tr>.*?</tr>", text)
    assert [line for line in lines if other.name in line and line.endswith("<td>def5678</td></tr>")]


def test_gpus_come_before_the_cpu():
    cpu = [dataclasses.replace(r, device="a CPU", cudnn="none", run_id="cpu") for r in ROWS]
    assert list(report._devices([*cpu, *ROWS])) == ["a <fast> GPU", "a CPU, 2 threads"]


def test_a_comparison_is_within_one_run():
    days: Any = ({"run_id": day, "date": f"2026-11-2{n}"} for n, day in enumerate("mtw"))
    monday, tuesday, wednesday = days
    some = [
        row(INFER, "eager", 10.0, **monday),
        row(INFER, "fastunet", 9.0, **monday),
        row(INFER, "eager", 4.0, **tuesday),
        row(INFER, "fastunet", 5.0, **tuesday),
        row(INFER, "fastunet", 1.0, **wednesday),  # alone: there is nothing to compare it with
        row(OP, "fastunet", 1.0, **wednesday),
    ]
    found = verdicts.consistent(some)
    assert found == [some[2], some[3], some[5]]
    (verdict,) = verdicts.verdicts(found)
    assert (verdict.speed_up, verdict.word) == (0.8, "slower")


def test_where_fastunet_is_wrong_or_fails_it_is_said():
    found = [row(INFER, "eager", 4.0), row(INFER, "fastunet", None)]
    (verdict,) = verdicts.verdicts(found)
    assert (verdict.speed_up, verdict.word) == (None, "wrong")
    assert "wrong in 1" in report.page(found) and "faster in none" in report.page(found)
    assert f"| {INFER.name} | 4.00 ms | eager, 4.00 ms | - | wrong: NO parity <off> | - |" in report.readme_table(found)


def test_the_best_of_graph_and_plain_is_drawn():
    assert [r.median_ms for r in verdicts.best_of(ROWS) if r.provider == "compile"] == [1.6]


def test_charts_stay_readable_when_all_cases_are_there():
    """One figure a dtype, no picture much taller than wide, and a page of a few megabytes at most."""
    from benchmarks.cases import cases

    names = ("eager", "compile", "fastunet")
    every = [row(case, name, 1.0, graph=graph) for case in cases("cuda") for name in names for graph in (False, True)]
    made = charts.charts(every)
    assert {title.partition(":")[0] for title in made} == {
        *(f"{chart}, {dtype}" for chart in ("Ladder", "Roofline", "Latency") for dtype in ("bf16", "fp16", "tf32")),
        "Roofline, fp32", "Peak memory", "Time to first result",
    }  # fmt: skip
    for figure in made.values():
        assert figure.get_figheight() <= 1.6 * figure.get_figwidth()


def test_the_readmes_table_and_the_page_are_made_of_the_rows():
    found = rows.read(rows.RESULTS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.into_readme(readme, report.readme_table(found)) == readme, "run fastunet report --readme README.md"
    shown = (ROOT / "docs" / "results" / "index.html").read_text(encoding="utf-8")
    for device, some in report._devices(found).items():
        assert f"<h2>{device}</h2>" in shown
        assert all(report._versions(run) in shown for run in report._runs(some))


def test_the_readmes_table_stands_between_its_markers():
    table = report.readme_table(ROWS)
    assert (
        f"| {INFER.name} | 4.00 ms | compile (graph), 1.60 ms | 1.00 ms | 1.60x, faster | 1.0e-03 / 2.0e-03 |" in table
    )
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
    assert "<b class=faster>faster in 1</b>, <b class=even>even in 1</b>, <b class=slower>slower in 1</b>" in text
    assert "0.33x to 1.60x of the best competitor's speed" in text


def test_pictures_and_page_are_written(tmp_path):
    written = report.write(ROWS, tmp_path / "new" / "results")
    assert {path.suffix for path in written} == {".html", ".png"}
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width >= 600
    assert len([path for path in written if path.suffix == ".png"]) == 5


def test_without_rows_the_page_says_so():
    assert "No rows yet." in report.page([])


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# What a reader would do, and what they would see, as text for the test.
PROBE = """
<script>
window.onload = () => {
  const table = document.querySelector("table"), heads = [...table.tHead.rows[0].cells];
  const all = [...document.querySelectorAll("table")].at(-1);
  const median = [...all.tHead.rows[0].cells].findIndex(head => head.textContent === "median ms");
  const read = () => [...all.tBodies[0].rows].map(row => row.cells[median].textContent).join(" ");
  all.closest("details").open = true;
  const button = all.tHead.rows[0].cells[median].firstChild;
  button.focus();
  const reached = document.activeElement === button;
  button.click();
  const up = read();
  button.click();
  const charts = [...document.querySelectorAll("figure svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    return box.width > 200 && box.height > 100 && svg.querySelectorAll("path").length > 5;
  });
  const verdict = heads[2].getBoundingClientRect().right <= innerWidth;
  const wide = document.body.scrollWidth > innerWidth + 1;
  const result = {reached, verdict, up, down: read(), charts, errors: window.errors, wide};
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
    assert result["up"] == "- 0.100 0.300 0.900 1.00 1.00 1.20 1.60 2.00 4.00"
    assert result["down"] == "4.00 2.00 1.60 1.20 1.00 1.00 0.900 0.300 0.100 -"
    assert result["reached"]  # by keyboard
    assert result["verdict"]  # case, speed-up and verdict are in the first screen
    assert result["wide"] is False  # only tables and charts scroll sideways
