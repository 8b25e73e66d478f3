"""Run what PENDING.md lists, in its order, and keep what each command prints.

    python benchmarks/pending.py --out logs --budget 550
    python benchmarks/pending.py --out logs --only hopper --data nuclei

A command that several claims share runs once. Each has a log: the claims, the command, what it printed, its exit code.
Claims without one here (`make gpu` keeps to its own time) and what no time was left for are named at the end; what
the table adds in words is for a person. Exits 1 if a command fails, is stopped, or did not run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PENDING = ROOT / "benchmarks" / "PENDING.md"
_BEGIN = "PYTHONPATH=."  # of a command in the table
_GRACE = 15.0  # seconds from an interrupt to the end


def claims(text: str) -> Iterator[tuple[str, list[str]]]:
    """(claim, its commands) of each row of the first table."""
    table = text.partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    for claim, _, command in rows[1:]:
        yield claim.strip(), [code for code in re.findall(r"`([^`]+)`", command) if code.startswith(_BEGIN)]


def run(command: str, log: Path, seconds: float) -> str:
    """Append what the command prints to its log; returns how it ended."""
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as out:
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # What runs in the background may be told to ignore an interrupt, and would hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            ended = f"exit code {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            ended = f"stopped, out of {seconds:.0f} s"
            stop(process)
        except BaseException:  # by hand, or by who gave this program its time
            stop(process)
            raise
        out.write(f"\n{ended}, {time.monotonic() - start:.1f} s\n")
    return ended


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt it and what it started, so that it says what it has; end them if they go on."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the logs; made if it is not there")
    parser.add_argument("--budget", type=float, default=550.0, metavar="SECONDS", help="of all; default 550")
    parser.add_argument(
        "--each",
        type=float,
        default=480.0,
        metavar="SECONDS",
        help="of one command, which is interrupted then; default 480",
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="in the claim or the command")
    parser.add_argument("--data", metavar="DIR", help="images and masks, for the commands that name DATA")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    by_command: dict[str, list[str]] = {}
    left: list[str] = []
    for claim, commands in claims(PENDING.read_text(encoding="utf-8")):
        if not re.search(given.only, " ".join([claim, *commands])):
            continue
        for command in commands:
            by_command.setdefault(command, []).append(claim)
        if not commands:
            left.append(f"by itself: {claim}")
    given.out.mkdir(parents=True, exist_ok=True)
    deadline, failed = time.monotonic() + given.budget, False
    for number, (command, of) in enumerate(by_command.items(), 1):
        seconds = min(given.each, deadline - time.monotonic())
        if "DATA" in command and given.data is None:
            left.append(f"without --data: {command}")
        elif seconds < 1:
            left.append(f"out of time: {command}")
            failed = True
        else:
            if given.data is not None:
                command = command.replace("DATA", shlex.quote(str(Path(given.data).resolve())))
            log = given.out / f"{number:02}.txt"
            log.write_text("".join(f"claim: {claim}\n" for claim in of) + f"$ {command}\n\n", encoding="utf-8")
            ended = run(command, log, seconds)
            failed |= ended != "exit code 0"
            print(f"{log.name}: {ended}: {command[:100]}", flush=True)
    print(*left, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
