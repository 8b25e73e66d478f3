"""Does FastUNet train as plain PyTorch does? Same seeds, same windows, a table and a picture.

    python benchmarks/training.py DATA --out docs/training_curves.png
    python benchmarks/training.py DATA --all --norm batch --steps 12000 --out docs/training_curves_all.png

DATA is a folder for ``fastunet train``. Each seed draws initial weights, which all networks get, and
windows. FastUNet runs its operators, also on a CPU, which left alone trains with plain PyTorch. Plain PyTorch
trains twice, the second time in ``channels_last``: the same mathematics with its sums in another order, which
tells how far roundings alone carry a training.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from fastunet import FastUNet, UNetConfig, dispatch, train
from fastunet.files import atomic_write
from fastunet.reference import UNet

CONFIG = UNetConfig(features=(8, 16, 32, 64), align_corners=False)
OURS, PLAIN, AGAIN = NETWORKS = "FastUNet", "plain PyTorch", "plain PyTorch, channels_last"
STYLES: dict[str, str] = dict(zip(NETWORKS, ("-", "--", ":"), strict=True))
FIRST, LAST = 10, 50  # steps: compared one by one; averaged
DRAWN = 3  # seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--all", action="store_true", help="all images; else small grey ones")
    parser.add_argument("--norm", choices=("batch", "instance"), help="of the networks; default none")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    if not arguments.out.parent.is_dir():
        parser.error(f"--out: {arguments.out.parent}: no such folder")
    try:
        data = train.find(arguments.data, CONFIG.in_channels, CONFIG.out_channels)
        settings = train.Settings(arguments.steps, size=64, lr=arguments.lr, every=max(1, arguments.steps // 4))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    config = dataclasses.replace(CONFIG, norm=arguments.norm)
    data = data if arguments.all else small_and_grey(data)
    curves: dict[tuple[str, int], list[float]] = {}
    dices: dict[tuple[str, int], list[train.Point]] = {}
    for seed in range(arguments.seeds):
        for name in NETWORKS:
            curves[name, seed], dices[name, seed] = run(name, config, seed, data, settings, arguments.device)
    report(curves, dices)
    draw(arguments.out, curves, dices)


def small_and_grey(data: train.Data) -> train.Data:
    """Fluorescence images of up to 360 pixels a side: so small a network learns them in minutes, stained tissue not."""
    small, val = (
        [p for p in pairs if max(p.shape) <= 360 and p.read(2)[0].ndim == 2] for pairs in (data.train, data.val)
    )
    return train.Data(small, val, data.channels, data.classes)


def run(
    name: str, config: UNetConfig, seed: int, data: train.Data, settings: train.Settings, device: str
) -> tuple[list[float], list[train.Point]]:
    """The loss of each step, and the points."""
    torch.manual_seed(seed)
    model, losses, start = new_model(name, config), [], time.perf_counter()
    if name == AGAIN:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    settings = dataclasses.replace(settings, seed=seed)
    process = train.Processes(torch.device(device))
    operators = dispatch.forced("torch" if device == "cpu" else "triton")
    with tempfile.TemporaryDirectory() as out, operators:
        keep = lambda _, loss: losses.append(loss.item())
        points = train.fit(model, data, out, settings, process=process, on_step=keep)
    print(f"seed {seed}, {name}: Dice {points[-1].dice:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    return losses, points


def report(curves: dict[tuple[str, int], list[float]], dices: dict[tuple[str, int], list[train.Point]]) -> None:
    """The table."""
    seeds = sorted({seed for _, seed in curves})
    print(f"| seed | network | largest difference of the first {FIRST} losses | loss at the end ", end="")
    print("| Dice, all pixels | Dice, mean of images |")
    print("|---|---|---|---|---|---|")
    for seed in seeds:
        for name in NETWORKS:
            gap = max(differences(curves, name, seed)[:FIRST])
            loss, point = end(curves[name, seed]), dices[name, seed][-1]
            print(f"| {seed} | {name} | {gap:.1e} | {loss:.4f} | {point.dice:.4f} | {point.mean_dice:.4f} |")
    for name in NETWORKS:
        ends = spread([end(curves[name, seed]) for seed in seeds])
        points = [dices[name, seed][-1] for seed in seeds]
        pooled, by_image = spread([p.dice for p in points]), spread([p.mean_dice for p in points])
        print(f"| all | {name} | | {ends} | {pooled} | {by_image} |")
    for name in (OURS, AGAIN):
        ends = distance([end(curves[name, seed]) - end(curves[PLAIN, seed]) for seed in seeds])
        points = [(dices[name, seed][-1], dices[PLAIN, seed][-1]) for seed in seeds]
        pooled = distance([a.dice - b.dice for a, b in points])
        by_image = distance([a.mean_dice - b.mean_dice for a, b in points])
        print(f"| from {PLAIN} | {name} | | {ends} | {pooled} | {by_image} |")


def new_model(name: str, config: UNetConfig) -> UNet:
    """Weights as He et al. (2015, arXiv:1502.01852): from torch's own, hundreds of steps learn nothing."""
    model = (FastUNet if name == OURS else UNet).from_config(config)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model


def end(losses: list[float]) -> float:
    return statistics.mean(losses[-LAST:])


def differences(curves: dict[tuple[str, int], list[float]], name: str, seed: int) -> list[float]:
    """Of each step's loss from that of plain PyTorch, relative."""
    return [abs(a - b) / b for a, b in zip(curves[name, seed], curves[PLAIN, seed], strict=True)]


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def distance(values: list[float]) -> str:
    """Signed mean; root mean square and largest size."""
    size = (statistics.mean(v * v for v in values)) ** 0.5
    return f"{statistics.mean(values):+.4f} (rms {size:.4f}, at most {max(map(abs, values)):.4f})"


def draw(
    path: Path, curves: dict[tuple[str, int], list[float]], dices: dict[tuple[str, int], list[train.Point]]
) -> None:
    """Losses, their differences and Dice, over steps; a colour for each of the first seeds."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, gaps, scores = figure.subplots(1, 3)
    smooth = max(20, len(next(iter(curves.values()))) // 100)
    for (name, seed), values in curves.items():
        if seed >= DRAWN:
            continue
        style = {"color": f"C{seed}", "ls": STYLES[name], "label": f"{name}, {seed}"}
        mean = torch.tensor(values).unfold(0, min(smooth, len(values)), 1).mean(1)
        losses.plot(range(len(values) - len(mean) + 1, len(values) + 1), mean, **style)
        points = dices[name, seed]
        scores.plot([p.step for p in points], [p.dice for p in points], **style)
        if name != PLAIN:
            gap = differences(curves, name, seed)
            gaps.plot(range(1, len(values) + 1), gap, lw=0.7, **style)
            if any(gap):
                gaps.set_yscale("log")
    losses.set(title=f"loss, mean of {smooth} steps", xlabel="step")
    gaps.set(title="relative difference from plain PyTorch's loss", xlabel="step")
    scores.set(title="validation Dice, all pixels", xlabel="step")
    for axes in (losses, gaps, scores):
        axes.grid(alpha=0.3)
    losses.legend(fontsize=6)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


if __name__ == "__main__":
    main()
