"""Does FastUNet train as plain PyTorch does? Same seeds, same windows, both networks; a table and a picture.

    python benchmarks/training.py DATA --out docs/training_curves.png

DATA is a folder for ``fastunet train``. Each seed draws initial weights, which both networks get, and
windows. Without norm layers, since with batch norm that trains FastUNet runs the reference itself on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from fastunet import FastUNet, UNetConfig, train
from fastunet.files import atomic_write
from fastunet.reference import UNet

CONFIG = UNetConfig(features=(8, 16, 32, 64), align_corners=False)
NETWORKS = {"FastUNet": FastUNet, "plain PyTorch": UNet}
FIRST, LAST = 10, 50  # steps: compared one by one; averaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    data = train.find(arguments.data, CONFIG.in_channels, CONFIG.out_channels)
    curves: dict[tuple[str, int], list[float]] = {}
    dices: dict[tuple[str, int], list[train.Point]] = {}
    for seed in range(arguments.seeds):
        for name, network in NETWORKS.items():
            torch.manual_seed(seed)
            model, losses, start = he_init(network.from_config(CONFIG)), [], time.perf_counter()
            settings = train.Settings(steps=arguments.steps, every=max(1, arguments.steps // 3), size=64, seed=seed)
            with tempfile.TemporaryDirectory() as out:
                points = train.fit(
                    model,
                    data,
                    out,
                    settings,
                    process=train.Processes(torch.device(arguments.device)),
                    on_step=lambda step, loss, losses=losses: losses.append(loss.item()),
                )
            curves[name, seed], dices[name, seed] = losses, points
            print(f"seed {seed}, {name}: Dice {points[-1].dice:.4f}, {time.perf_counter() - start:.0f} s", flush=True)

    print("| seed | largest difference of the first 10 losses, relative | loss at the end | Dice |")
    print("|---|---|---|---|")
    for seed in range(arguments.seeds):
        ours, theirs = (curves[name, seed] for name in NETWORKS)
        first = max(abs(a - b) / b for a, b in zip(ours[:FIRST], theirs[:FIRST], strict=True))
        end = " / ".join(f"{statistics.mean(curves[name, seed][-LAST:]):.4f}" for name in NETWORKS)
        dice = " / ".join(f"{dices[name, seed][-1].dice:.4f}" for name in NETWORKS)
        print(f"| {seed} | {first:.1e} | {end} | {dice} |")
    for name in NETWORKS:
        ends = [statistics.mean(curves[name, seed][-LAST:]) for seed in range(arguments.seeds)]
        last = [dices[name, seed][-1].dice for seed in range(arguments.seeds)]
        print(f"{name}: loss {_spread(ends)}, Dice {_spread(last)}")
    draw(arguments.out, curves, dices)


def he_init(model: UNet) -> UNet:
    """Weights as He et al. (2015, arXiv:1502.01852): from torch's own, nothing is learned for hundreds of steps."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _spread(values: list[float]) -> str:
    return (
        f"{statistics.mean(values):.4f} (standard deviation {statistics.stdev(values) if len(values) > 1 else 0:.4f})"
    )


def draw(
    path: Path, curves: dict[tuple[str, int], list[float]], dices: dict[tuple[str, int], list[train.Point]]
) -> None:
    """Losses, their differences and Dice, over steps; a colour for each seed, dashes for plain PyTorch."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, differences, scores = figure.subplots(1, 3)
    for (name, seed), values in curves.items():
        style = {"color": f"C{seed}", "ls": "-" if name == "FastUNet" else "--", "label": f"{name}, seed {seed}"}
        mean = torch.tensor(values).unfold(0, min(20, len(values)), 1).mean(1)
        losses.plot(range(len(values) - len(mean) + 1, len(values) + 1), mean, **style)
        points = dices[name, seed]
        scores.plot([p.step for p in points], [p.dice for p in points], **style)
        if name == "FastUNet":
            other = curves["plain PyTorch", seed]
            gaps = [abs(a - b) / b for a, b in zip(values, other, strict=True)]
            differences.semilogy(range(1, len(gaps) + 1), gaps, color=f"C{seed}", lw=0.8, label=f"seed {seed}")
    losses.set(title="loss, mean of 20 steps", xlabel="step")
    differences.set(title="relative difference of the two losses", xlabel="step")
    scores.set(title="validation Dice, all pixels", xlabel="step")
    for axes in (losses, differences, scores):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


if __name__ == "__main__":
    main()
