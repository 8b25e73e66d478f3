"""``fastunet bench`` and ``fastunet report``: measure, and show what was measured. Both need a checkout."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_write
from .shared import SetupError, a_count, a_device, a_seed, examples, new_console, new_progress, new_table

# Of each case, in seconds: timing, and what a provider may take for its first result or a call.
SECONDS, QUICK_SECONDS = 5.0, 1.0
LIMIT, QUICK_LIMIT = 900.0, 120.0
# Compiles for minutes a case: not for --quick.
SLOW_TO_COMPILE = "compile max-autotune triton"


def add(commands: Any) -> None:
    """Add both commands to the parser's."""
    command = commands.add_parser(
        "bench",
        help="time FastUNet beside PyTorch's best",
        description="""\
Time every provider on every case, in interleaved rounds, after its output has been checked against
float64. Rows are appended to benchmarks/results/<device>.jsonl. Needs a checkout of FastUNet.

Exit code: 0 FastUNet was timed on all cases that ran (or --providers left it out), 1 it was wrong or
failed on some (the row says why; what a competitor does changes nothing), 2 nothing started.""",
        **examples(
            "fastunet bench --quick",
            "fastunet bench --cases 'infer seed 256' --providers fastunet compile --budget 300",
            "fastunet bench --quick --compare benchmarks/results/nvidia-h200.jsonl",
        ),
    )
    command.add_argument("--cases", nargs="+", metavar="TEXT", help="those whose name holds one of the texts")
    command.add_argument("--providers", nargs="+", metavar="NAME", help="these alone (default: all that serve)")
    command.add_argument("--quick", action="store_true", help=f"a few cases, 1 second each, no {SLOW_TO_COMPILE!r}")
    command.add_argument("--budget", type=a_count, metavar="SECONDS", help="start no case later than that")
    command.add_argument("--compare", type=Path, metavar="FILE", help="show each ratio to the rows of this file")
    command.add_argument("--out", type=Path, metavar="FILE", help="append rows here instead")
    command.add_argument("--seed", type=a_seed, default=0, metavar="S", help="of weights and inputs (default: 0)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument(
        "--device", type=a_device, default=default, help="cpu, cuda or cuda:N (default here: %(default)s)"
    )
    command.set_defaults(run=bench)

    command = commands.add_parser(
        "report",
        help="turn benchmark rows into a page, pictures and the README's table",
        description="""\
Write index.html, which opens from disk, and PNG charts from benchmark rows; on request also the
table between the README's markers. Needs a checkout of FastUNet and matplotlib.""",
        **examples(
            "fastunet report", "fastunet report --rows benchmarks/results --out docs/results --readme README.md"
        ),
    )
    command.add_argument("--rows", type=Path, metavar="FILE|FOLDER", help="default: benchmarks/results")
    command.add_argument("--out", type=Path, metavar="DIR", help="default: docs/results")
    command.add_argument("--readme", type=Path, metavar="FILE", help="also write the table into this file")
    command.set_defaults(run=report)


def _benchmarks(name: str) -> Any:
    """A module of the checkout's ``benchmarks`` folder, which is not installed."""
    root = Path(__file__).resolve().parents[2]
    if (root / "benchmarks" / "cases.py").is_file() and str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        return importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        raise SetupError(
            f"benchmarks are not installed: in a checkout of FastUNet run it as python -m fastunet ({error})"
        ) from None


def bench(arguments: argparse.Namespace) -> int:
    """Run, append rows, print a table."""
    cases_module, providers_module = _benchmarks("cases"), _benchmarks("providers")
    rows_module, bench_module = _benchmarks("rows"), _benchmarks("bench")
    device = arguments.device
    kind = torch.device(device).type
    cases = cases_module.quick(kind) if arguments.quick and not arguments.cases else cases_module.cases(kind)
    if arguments.cases:
        chosen = [case for case in cases if any(text in case.name for text in arguments.cases)]
        if not chosen:
            raise SetupError(f"--cases: no case's name holds {' or '.join(map(repr, arguments.cases))}")
        cases = chosen
    names = [provider.name for provider in providers_module.PROVIDERS]
    for name in arguments.providers or ():
        if name not in names:
            raise SetupError(f"--providers: expected some of {', '.join(map(repr, names))}, got {name!r}")
    if arguments.quick:
        names.remove(SLOW_TO_COMPILE)
    names = arguments.providers or names
    serving = [provider for provider in providers_module.PROVIDERS if provider.name in names]
    if not any(provider.serves(case, kind) for provider in serving for case in cases):
        raise SetupError(f"--providers: {', '.join(map(repr, names))} serve none of the {len(cases)} cases on {kind}")
    try:
        before = rows_module.read(arguments.compare) if arguments.compare is not None else None
    except rows_module.RowError as error:
        raise SetupError(f"--compare: {error}") from None
    out = arguments.out or rows_module.file_of(bench_module.device_name(device))
    try:
        rows_module.check_writable(out)
    except OSError as error:
        raise SetupError(f"--out: cannot write {out} ({error.strerror})") from None

    console, errors, rows, started = new_console(), new_console(stderr=True), [], []
    interrupted, start = False, time.monotonic()
    with new_progress(errors) as progress:
        task = progress.add_task("", total=len(cases))

        def on_case(case: Any) -> None:
            progress.update(task, completed=len(started), description=case.name)
            started.append(case)

        try:
            for row in bench_module.run(
                cases,
                names,
                device,
                seconds=QUICK_SECONDS if arguments.quick else SECONDS,
                limit=QUICK_LIMIT if arguments.quick else LIMIT,
                budget=arguments.budget,
                seed=arguments.seed,
                on_case=on_case,
            ):
                rows_module.append(out, row)
                rows.append(row)
        except KeyboardInterrupt:
            interrupted = True
    _print(console, rows)
    if before is not None:
        _print_changes(console, rows_module.changes(rows, before))
    measured = {row.case for row in rows}
    left = [case.name for case in cases if case.name not in measured]
    if left:
        console.print(f"left out ({len(left)}): {', '.join(left)}", soft_wrap=True)
    console.print(f"{len(rows)} rows in {out}, {time.monotonic() - start:.0f} s", soft_wrap=True)
    if interrupted:
        console.print("interrupted: these are the rows so far")
    if "fastunet" not in names:
        console.print("no verdicts: 'fastunet' is not among the --providers")
    _print_verdicts(console, _benchmarks("verdicts").verdicts(rows))
    if interrupted:
        return 130
    ours = [row for row in rows if row.provider in providers_module.OURS]
    return 0 if rows and all(row.state == "ok" for row in ours) else 1


def _print(console: Any, rows: list[Any]) -> None:
    digits = _benchmarks("rows").digits
    numeric = ("median ms", "p20..p80", "TFLOP/s", "GB/s", "of ceiling", "error", "eager's", "MiB", "first ms")
    table = new_table("case", "provider", *numeric, numeric=numeric)
    last = None
    for row in rows:
        case, last = (row.case if row.case != last else ""), row.case
        if row.state != "ok":
            table.add_row(case, row.label, row.state, row.reason)
            continue
        table.add_row(
            case,
            row.label,
            digits(row.median_ms),
            f"{digits(row.p20_ms)}..{digits(row.p80_ms)}",
            digits(row.tflops),
            digits(row.gbs),
            "-" if row.share is None else f"{row.share:.0%}",
            f"{row.max_err:.1e}",
            f"{row.baseline_err:.1e}",
            "-" if row.peak_mem_mb is None else f"{row.peak_mem_mb:.0f}",
            f"{row.first_ms:.0f}",
        )
    console.print(table)


def _print_verdicts(console: Any, verdicts: list[Any]) -> None:
    digits = _benchmarks("rows").digits
    numeric = ("its ms", "FastUNet ms", "speed-up", "error", "eager's")
    table = new_table("case", "best competitor", *numeric, "verdict", numeric=numeric)
    for v in verdicts:
        best = v.ours.case, v.best.label, digits(v.best.median_ms)
        if v.speed_up is None:
            table.add_row(*best, "-", "-", "-", "-", f"{v.word}: {v.ours.reason}")
            continue
        errors = f"{v.ours.max_err:.1e}", f"{v.ours.baseline_err:.1e}"
        table.add_row(*best, digits(v.ours.median_ms), f"{v.speed_up:.2f}x", *errors, v.word)
    console.print(table)


def _print_changes(console: Any, changes: list[Any]) -> None:
    digits = _benchmarks("rows").digits
    numeric = ("before ms", "now ms", "speed-up")
    table = new_table("case", "provider", *numeric, "", numeric=numeric)
    for change in changes:
        now = ("-", "-") if change.ratio is None else (digits(change.row.median_ms), f"{change.ratio:.2f}x")
        table.add_row(change.row.case, change.row.label, digits(change.before.median_ms), *now, change.word)
    console.print(table)
    if not changes:
        console.print("nothing to compare: no earlier row is of these cases on this device", soft_wrap=True)


def report(arguments: argparse.Namespace) -> int:
    """Rows into a page, pictures and a table."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SetupError("report: needs matplotlib (pip install 'fastunet[verify]')")
    rows_module, report_module = _benchmarks("rows"), _benchmarks("report")
    source = arguments.rows or rows_module.RESULTS
    try:
        rows = rows_module.read(source)
    except rows_module.RowError as error:
        raise SetupError(f"--rows: {error}") from None
    if not rows:
        raise SetupError(f"--rows: no rows in {source} (fastunet bench makes them)")
    try:
        readme = arguments.readme and report_module.into_readme(
            arguments.readme.read_text(encoding="utf-8"), report_module.readme_table(rows)
        )
    except (OSError, ValueError) as error:
        raise SetupError(f"--readme: {error}") from None
    try:
        written = report_module.write(rows, arguments.out or rows_module.RESULTS.parents[1] / "docs" / "results")
        if readme:
            with atomic_write(arguments.readme) as temporary:
                temporary.write_text(readme, encoding="utf-8")
            written.append(arguments.readme)
    except OSError as error:
        raise SetupError(f"--out: cannot write {error.filename} ({error.strerror})") from None
    console = new_console()
    for path in written:
        console.print(str(path), soft_wrap=True)
    return 0
