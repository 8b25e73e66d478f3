"""What one call of ``fastunet verify`` has found, and the commands that find it again."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from typing import Any

from .. import dispatch
from ..parity import Report
from ..parity.fuzz import Case, Fuzzed
from ..parity.report import Check, Comparison, lines_of


class Findings:
    """All that one call of the command has found so far."""

    def __init__(self) -> None:
        self.results: list[Comparison | Check] = []  # of the model, while there is no report
        self.report: Report | None = None
        self.configs: list[Comparison] | None = None
        self.fuzzed: Fuzzed | None = None
        self.failure: str | None = None  # why a check of the model ended early
        self.interrupted = False

    @property
    def ok(self) -> bool:
        return self._held() and self.failure is None and not self.interrupted

    def _held(self) -> bool:
        """Whether all did that was compared."""
        compared = all(found.ok for found in (*self.results, *(self.configs or ())))
        fuzzed = self.fuzzed is None or self.fuzzed.case is None
        return (self.report is None or self.report.ok) and compared and fuzzed

    def to_dict(self) -> dict[str, Any]:
        fuzzed = self.fuzzed
        finding = fuzzed and fuzzed.finding
        return {
            "ok": self.ok,
            "interrupted": self.interrupted,
            "failure": self.failure,
            "report": self.report and self.report.to_dict(),
            "results": [r.to_dict() if isinstance(r, Comparison) else vars(r) for r in self.results],
            "configs": self.configs and [c.to_dict() for c in self.configs],
            "fuzz": fuzzed
            and {
                "passed": fuzzed.passed,
                "failed": fuzzed.case and fuzzed.case.to_dict(),
                "finding": finding.to_dict() if isinstance(finding, Report) else finding and repr(finding),
            },
        }

    def summary(self, arguments: argparse.Namespace) -> str:
        lines = lines_of([c for c in self.results if isinstance(c, Comparison)]) if self.results else []
        lines += [str(c) for c in self.results if isinstance(c, Check)]
        if self.configs is not None:
            broken = [c for c in self.configs if not c.ok]
            lines += [f"BROKEN: {c.name} as {c.implementation}: {c.parity}" for c in broken]
            lines.append(f"launch configurations: {len(self.configs) - len(broken)} of {len(self.configs)} hold")
            lines.append("(those that may be chosen on this device; layers that run on PyTorch's operators have none)")
            if broken:
                lines.append(f"again: {command_of(arguments)} --all-configs")
        if self.fuzzed is not None:
            in_part = ", in the forward pass (the interpreter is too slow for more)" if dispatch.interpreting() else ""
            lines.append(f"random networks: {self.fuzzed.passed} hold{in_part}")
            if self.fuzzed.case is not None:
                finding, command = self.fuzzed.finding, case_command(self.fuzzed.case, arguments)
                lines.append("the simplest that does not:")
                if isinstance(finding, Report):
                    lines.append(str(dataclasses.replace(finding, command=command)))
                else:
                    lines += [f"raised {finding!r}", f"again: {command}"]
        if self.failure is not None:
            lines.append(f"ended early: {self.failure}; these are the results so far")
        if self.interrupted:
            nothing = not (self.results or self.report or self.configs or self.fuzzed)
            lines.append("interrupted: " + ("nothing was compared yet" if nothing else "these are the results so far"))
        if self.ok:
            lines.append("all holds")
        else:
            some = self.results or self.configs or self.fuzzed
            lines.append("what was compared holds" if some and self._held() else "NOT all holds")
        return "\n".join(lines)


def command_of(arguments: argparse.Namespace) -> str:
    """The command line that repeats the check of the model, defaults that vary by machine included."""
    words = _command_words()
    if arguments.weights is not None:
        words += ["--weights", str(arguments.weights)]
    if arguments.config is not None:
        words += ["--config", arguments.config.to_json()]
    if arguments.size is not None:
        words += ["--size", "{}x{}".format(*arguments.size)]
    for option in ("factory", "images", "batch", "seed", "device", "dtype"):
        value = getattr(arguments, option)
        if value is not None:
            words += [f"--{option}", str(value)]
    if not arguments.gradients:
        words.append("--no-gradients")
    return shlex.join(words)


def case_command(case: Case, arguments: argparse.Namespace) -> str:
    words = [*_command_words(), "--case", case.to_json(), "--device", arguments.device]
    return shlex.join([*words, "--dtype", "tf32"] if arguments.dtype == "tf32" else words)


def _command_words() -> list[str]:
    return [*(["TRITON_INTERPRET=1"] if dispatch.interpreting() else []), "fastunet", "verify"]
