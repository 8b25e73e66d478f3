"""What a check found: for people as text, for machines as a dict, for the eye as a picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .rule import Parity


@dataclass(frozen=True)
class Errors:
    """Distance to the truth over the elements that are finite in it."""

    max: float
    mean: float
    relative_l2: float

    def over(self, other: Errors) -> Errors:
        """How many times the others these are; 1 where both are 0."""

        def ratio(mine: float, theirs: float) -> float:
            return mine / theirs if theirs else 1.0 if mine == 0 else math.inf

        return Errors(*map(ratio, vars(self).values(), vars(other).values()))


@dataclass(frozen=True)
class Alone:
    """A layer's operator by itself: the reference's on the candidate's own tensors (:mod:`fastunet.parity.alone`)."""

    parity: Parity
    candidate: Errors
    baseline: Errors


@dataclass(frozen=True)
class Comparison:
    """One tensor.

    Attributes:
        kind: ``"layer"``, ``"output"``, ``"gradient"`` or, of a launch configuration, ``"config"``.
        implementation: of what the candidate ran; ``"reference"`` is the baseline's own code.
        alone: of a layer, the same for it by itself.
    """

    kind: str
    name: str
    implementation: str
    parity: Parity
    candidate: Errors
    baseline: Errors
    alone: Alone | None = None

    @property
    def ok(self) -> bool:
        return self.parity.ok and (self.alone is None or self.alone.parity.ok)

    @property
    def ratio(self) -> Errors:
        """Errors of the candidate over the baseline's."""
        return self.candidate.over(self.baseline)

    @property
    def verdict(self) -> str:
        """What is to be said of it at the end of its line."""
        if not self.parity.ok:
            return f"BROKEN: {self.parity.reason}"
        if self.alone is not None and not self.alone.parity.ok:
            return f"BROKEN on its own input: {self.alone.parity}"
        return "(the baseline's own code)" if self.implementation == "reference" else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values; infinities, which JSON lacks, become None."""
        return _finite({**dataclasses.asdict(self), "ok": self.ok, "ratio": dataclasses.asdict(self.ratio)})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Check:
    """A property that holds or not, and what was seen."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'BROKEN'}: {self.name} ({self.detail})"


@dataclass(frozen=True)
class Segmentation:
    """Classes against the truth's: arg-max, or logit > 0 of a single channel.

    Attributes:
        flips: pixels of another class. pixels: of all.
        dice, iou: of each class but 0, or of the single one, the overlap with the truth's; 1 where
            both are empty.
        median_margin, margin: the median and the largest distance to the decision boundary, in
            logits of the truth, among the flipped pixels. A flip at a small margin is rounding; at
            a large one it is a mistake.
    """

    flips: int
    pixels: int
    dice: tuple[float, ...]
    iou: tuple[float, ...]
    median_margin: float
    margin: float

    def __str__(self) -> str:
        at = ""
        if self.flips:
            at = f", {self.median_margin:.1e} (median) to {self.margin:.1e} from the decision boundary"
        worst = "" if len(self.dice) == 1 else " in the worst class"
        lower = f"Dice lower by {1 - min(self.dice):.1e}, IoU by {1 - min(self.iou):.1e}{worst}"
        return f"{self.flips} of {self.pixels} pixels of another class{at}; {lower}"


@dataclass(frozen=True)
class Report:
    """What :func:`fastunet.verify` found; ``str()`` is for people, :meth:`to_dict` for machines.

    Attributes:
        comparisons: layers in the order in which they run, the output, then gradients in the order
            in which they are found, the last layer's first.
        checks: of the candidate alone.
        not_compared: what could not be, and why. about: which model, reference and inputs.
        versions: of what ran, and on how many threads.
        candidate_map, baseline_map: (N, H, W) float32 on the CPU, the largest error among a pixel's
            logits; not in the dict. :func:`fastunet.parity.picture.draw` shows them.
        command: a command line that repeats the check, where it came from one.
    """

    device: str
    dtype: str
    input_shape: tuple[int, ...]
    comparisons: tuple[Comparison, ...]
    checks: tuple[Check, ...]
    not_compared: tuple[str, ...]
    about: tuple[str, ...]
    versions: str
    candidate_segmentation: Segmentation
    baseline_segmentation: Segmentation
    candidate_map: Tensor = field(repr=False)
    baseline_map: Tensor = field(repr=False)
    command: str | None = None

    @property
    def ok(self) -> bool:
        return all(c.ok for c in self.comparisons) and all(c.ok for c in self.checks)

    @property
    def first_failure(self) -> Comparison | None:
        """The first comparison that breaks the rule."""
        return next((c for c in self.comparisons if not c.ok), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {
            "ok": self.ok,
            "device": self.device,
            "dtype": self.dtype,
            "input_shape": list(self.input_shape),
            "comparisons": [c.to_dict() for c in self.comparisons],
            "checks": [dataclasses.asdict(c) for c in self.checks],
            "not_compared": list(self.not_compared),
            "about": list(self.about),
            "versions": self.versions,
            "candidate_segmentation": dataclasses.asdict(self.candidate_segmentation),
            "baseline_segmentation": dataclasses.asdict(self.baseline_segmentation),
            "command": self.command,
        }

    def __str__(self) -> str:
        shape = "x".join(map(str, self.input_shape))
        lines = [f"{self.dtype} on {self.device}, input {shape}; errors are distances to float64"]
        lines += [*self.about, self.versions, "", *lines_of(self.comparisons), ""]
        lines.append(f"candidate: {self.candidate_segmentation}")
        lines.append(f"baseline: {self.baseline_segmentation}")
        lines += [str(check) for check in self.checks]
        lines += [f"not compared: {what}" for what in self.not_compared]
        first = self.first_failure
        if first is not None:
            lines.append(f"first to break the rule: {first.kind} {first.name}, on {first.implementation}")
        if not self.ok and self.command is not None:
            lines.append(f"again: {self.command}")
        lines.append("parity" if self.ok else "NO parity")
        return "\n".join(lines)


def lines_of(comparisons: Sequence[Comparison]) -> list[str]:
    """A table, a line for each, and two above."""
    width = max((len(f"{c.kind} {c.name}") for c in comparisons), default=0)
    lines = [
        f"{'':{width}}  ----------- largest -----------    --------- mean ---------    ------ relative L2 -----",
        f"{'':{width}}     ours  baseline  ratio    limit      ours  baseline  ratio      ours  baseline  ratio",
    ]
    for c in comparisons:
        line = (
            f"{f'{c.kind} {c.name}':{width}}  {c.candidate.max:7.1e}   {c.baseline.max:7.1e}"
            f"  {c.ratio.max:5.2f}  {c.parity.limit:7.1e}   {c.candidate.mean:7.1e}   {c.baseline.mean:7.1e}"
            f"  {c.ratio.mean:5.2f}   {c.candidate.relative_l2:7.1e}   {c.baseline.relative_l2:7.1e}"
            f"  {c.ratio.relative_l2:5.2f}  {c.verdict}"
        )
        lines.append(line.rstrip())
    return lines
