"""Concatenate, add, or no skips at all: three U-Nets on the same data, with a score of their boundaries.

    python examples/skip_connections.py DATA --out docs/skip_connections.png

DATA is a folder for ``fastunet train``. The three differ in what a decoder level makes of the encoder's
map: ``concat`` stacks it beside the upsampled one, ``add`` sums both, ``none`` leaves it out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from fastunet import UNetConfig, train, weights
from fastunet.files import atomic_write
from fastunet.images import overlay, scale
from fastunet.predict import predict_mask
from fastunet.reference import DoubleConv, UNet, Up, pad_to

SKIPS = "concat", "add", "none"
# bilinear_conv gives the upsampled map the skip's channels, without which they could not be added.
CONFIG = UNetConfig(features=(8, 16, 32, 64), upsample="bilinear_conv", align_corners=False, norm="batch")
TOLERANCE = 2  # pixels
SHOWN = 128  # side of the pictures in pixels


class SkipUNet(UNet):
    """A U-Net whose decoder takes its skips in one of three ways."""

    def __init__(self, skip: str, config: UNetConfig = CONFIG) -> None:
        super().__init__(**vars(config))
        self.skip = skip
        if skip != "concat":
            for level, up in zip(reversed(range(config.depth)), self.ups, strict=True):
                assert isinstance(up, Up)
                up.conv = DoubleConv(config.features[level], config.features[level], norm=config.norm)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.downs:
            x, skip = down(x)
            skips.append(skip)
        x = self.bottleneck(x)
        for up in self.ups:
            assert isinstance(up, Up)
            skip = skips.pop()
            x = pad_to(up.up(x), skip.shape[-2], skip.shape[-1])
            if self.skip == "concat":
                x = torch.cat([x, skip], 1)
            elif self.skip == "add":
                x = x + skip
            x = up.conv(x)
        return self.head(x)


def boundary_f1(found: Tensor, truth: Tensor, tolerance: int = TOLERANCE) -> float:
    """Boundary F1 of two bool masks (H, W), as Csurka et al. (BMVC 2013), NaN where neither has a boundary.

    Precision is the share of the found boundary within ``tolerance`` pixels (rows and columns, each) of
    the true one, recall the reverse; F1 is their harmonic mean. A boundary pixel is a pixel of the mask
    that has a neighbour outside it, above, below, left or right.
    """
    edges = [_boundary(mask) for mask in (found, truth)]
    if not any(edge.any() for edge in edges):
        return float("nan")
    window = 2 * tolerance + 1
    wide = [F.max_pool2d(edge[None].float(), window, 1, tolerance)[0] > 0 for edge in edges]
    precision, recall = ((a & b).sum() / a.sum().clamp_min(1) for a, b in ((edges[0], wide[1]), (edges[1], wide[0])))
    return float(2 * precision * recall / (precision + recall)) if precision + recall > 0 else 0.0


def _boundary(mask: Tensor) -> Tensor:
    near = F.pad(mask[None, None].float(), (1, 1, 1, 1), mode="replicate")[0, 0]
    inside = near[:-2, 1:-1] * near[2:, 1:-1] * near[1:-1, :-2] * near[1:-1, 2:]
    return mask & (inside == 0)


def mean_boundary_f1(model: UNet, pairs: Sequence[train.Pair]) -> float:
    """Mean boundary F1 of the images."""
    values = []
    for pair in pairs:
        image, mask = pair.read(2)
        found = torch.from_numpy(predict_mask(model, image)) > 0
        values.append(boundary_f1(found, torch.from_numpy(mask) > 0))
    return float(np.nanmean(values))


def trained(skip: str, data: train.Data, steps: int, seed: int) -> tuple[UNet, train.Point]:
    """A network with the averaged weights, which are those that its point of the curve tells of; in eval mode."""
    torch.manual_seed(seed)
    model = SkipUNet(skip)
    settings = train.Settings(steps, size=64, lr=5e-3, ema=0.9, every=steps, seed=seed)
    with tempfile.TemporaryDirectory() as out:
        (last,) = train.fit(model, data, out, settings)
        model.load_state_dict(weights.read(Path(out) / "last.safetensors")[1])
    return model.eval(), last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()

    if not arguments.out.parent.is_dir():
        parser.error(f"--out: {arguments.out.parent}: no such folder")
    try:
        data = train.find(arguments.data, CONFIG.in_channels, CONFIG.out_channels)
    except train.DataError as error:
        raise SystemExit(str(error)) from None
    if not any(min(pair.shape) >= SHOWN for pair in data.val):
        parser.error(
            f"data: expected a validation image of at least {SHOWN}x{SHOWN} pixels to show a detail of, got none"
        )
    models: dict[str, UNet] = {}
    print(f"| skips | parameters | Dice, all pixels | Dice, mean of images | boundary F1 within {TOLERANCE} px |")
    print("|---|---|---|---|---|")
    for skip in SKIPS:
        found: list[tuple[float, ...]] = []
        for seed in range(arguments.seeds):
            model, last = trained(skip, data, arguments.steps, seed)
            found.append((last.dice, last.mean_dice, mean_boundary_f1(model, data.val)))
            models.setdefault(skip, model)
        parameters = sum(p.numel() for p in models[skip].parameters())
        cells = (f"{statistics.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in zip(*found, strict=True))
        print(f"| {skip} | {parameters:,} | {' | '.join(cells)} |", flush=True)
    draw(arguments.out, models, data)


def draw(path: Path, models: dict[str, UNet], data: train.Data) -> None:
    """A detail of two validation images, its mask, and what the networks of the first seed find."""
    small = [pair for pair in data.val if min(pair.shape) >= SHOWN]
    shown = [small[0], small[len(small) // 2]]
    figure = Figure(figsize=(2.2 * (2 + len(models)), 2.4 * len(shown)), layout="constrained")
    for axes, pair in zip(figure.subplots(len(shown), 2 + len(models)), shown, strict=True):
        image, mask = pair.read(2)
        top, left = _busiest(mask)
        cut = np.s_[top : top + SHOWN, left : left + SHOWN]
        pictures = {"image": scale(image, 1, pair.limits)[0].numpy()[cut], "mask": overlay(image, mask)[cut]}
        pictures |= {name: overlay(image, predict_mask(model, image))[cut] for name, model in models.items()}
        for axis, (name, picture) in zip(axes, pictures.items(), strict=True):
            axis.imshow(picture, cmap="gray", interpolation="nearest")
            axis.set_axis_off()
            axis.set_title(name, fontsize=9)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _busiest(mask: np.ndarray) -> tuple[int, int]:
    """Corner of the window of ``SHOWN`` pixels with the most boundary."""
    edges = _boundary(torch.from_numpy(mask) > 0).float()
    sums = F.avg_pool2d(edges[None], SHOWN, stride=16)[0]
    row, column = divmod(int(sums.argmax()), sums.shape[1])
    return 16 * row, 16 * column


if __name__ == "__main__":
    main()
