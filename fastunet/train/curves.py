"""The learning curve, as a table and as a picture."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import atomic_write

if TYPE_CHECKING:
    from .loop import Point


def write_csv(path: Path, points: Sequence[Point]) -> None:
    """A row for each point, in full precision."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dataclasses.asdict(points[0])))
        writer.writeheader()
        writer.writerows(dataclasses.asdict(point) for point in points)


def write_png(path: Path, points: Sequence[Point]) -> None:
    """Losses on the left, Dice on the right, both over steps."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and looks for a display

    figure = Figure(figsize=(9, 3.5))
    losses, dices = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.14, top=0.9)  # automatic layouts draw twice
    steps = [point.step for point in points]
    losses.plot(steps, [point.loss for point in points], label="training windows")
    losses.plot(steps, [point.val_loss for point in points], label="validation images")
    dices.plot(steps, [point.dice for point in points], label="all pixels")
    dices.plot(steps, [point.mean_dice for point in points], label="mean of images")
    best = max(points, key=lambda point: point.dice)
    dices.plot(best.step, best.dice, "o", label=f"best: {best.dice:.3f} at {best.step}")
    for axes, title in ((losses, "loss"), (dices, "validation Dice")):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
