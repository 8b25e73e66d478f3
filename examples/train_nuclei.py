"""Train the small nuclei model that ships with the package.

DATA holds ``train/`` and ``val/``, each with ``images/`` and ``labels/`` of equal file names;
a label above 0 is foreground. The images are a CC0 subset of the 2018 Data Science Bowl.

    python examples/train_nuclei.py DATA --out fastunet/pretrained/nuclei.safetensors

Training runs on the plain reference network, whose state_dict FastUNet shares key by key.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastunet import weights
from fastunet.images import normalise, read_image
from fastunet.predict import predict_mask
from fastunet.reference import UNet


def load(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """All (image, mask) pairs of a folder; masks are uint8 0 or 1."""
    pairs = []
    for path in sorted((folder / "images").iterdir()):
        with Image.open(folder / "labels" / path.name) as file:
            pairs.append((read_image(path), (np.asarray(file) > 0).astype(np.uint8)))
    return pairs


def crop(x: Tensor, mask: Tensor, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A random window under one of the eight symmetries of the square, with random exposure.

    Every other window is drawn around a nucleus: where those are a hundredth of the image, few
    windows would show one.
    """
    h, w = x.shape[1:]
    # Zoom first, so that nuclei of one microscope are seen at others' magnifications.
    side = int(size * rng.uniform(0.7, 1.4))
    rows, cols = min(side, h), min(side, w)
    top, left = rng.integers(0, h - rows + 1), rng.integers(0, w - cols + 1)
    nuclei = mask.nonzero()
    if rng.random() < 0.5 and len(nuclei):
        row, column = nuclei[rng.integers(len(nuclei))].tolist()
        top, left = min(max(row - rows // 2, 0), h - rows), min(max(column - cols // 2, 0), w - cols)
    x, mask = x[:, top : top + rows, left : left + cols], mask[top : top + rows, left : left + cols]
    x = F.interpolate(x[None], (size, size), mode="bilinear", align_corners=False)[0]
    mask = F.interpolate(mask[None, None].float(), (size, size), mode="nearest")[0, 0].long()
    turns = int(rng.integers(4))
    x, mask = torch.rot90(x, turns, (1, 2)), torch.rot90(mask, turns, (0, 1))
    if rng.random() < 0.5:
        x, mask = x.flip(2), mask.flip(1)
    x = x.clamp_min(0) ** math.exp(rng.normal(0, 0.3)) * math.exp(rng.normal(0, 0.15)) + rng.normal(0, 0.03)
    return x + torch.randn(x.shape) * abs(rng.normal(0, 0.02)), mask


def segmentation_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy plus soft Dice of the foreground."""
    p = logits.softmax(1)[:, 1]
    dice = (2 * (p * mask).sum((1, 2)) + 1) / (p.sum((1, 2)) + mask.sum((1, 2)) + 1)
    return F.cross_entropy(logits, mask) + 1 - dice.mean()


def foreground_dice(model: UNet, pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """(mean of the images' Dice, Dice of all pixels pooled)."""
    scores, overlap, total = [], 0, 0
    for image, mask in pairs:
        found = predict_mask(model, image) > 0
        both, either = int((found & (mask > 0)).sum()), int(found.sum()) + int(mask.sum())
        scores.append(2 * both / either if either else 1.0)
        overlap, total = overlap + both, total + either
    return float(np.mean(scores)), 2 * overlap / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate of the one-cycle schedule")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    train, val = load(arguments.data / "train"), load(arguments.data / "val")
    tensors = [(normalise(image, 1), torch.from_numpy(mask)) for image, mask in train]
    # A window sees less of a large image, and the stained tissue on bright ground is few and hard.
    draw = np.array([math.sqrt(x.numel()) * (2 if x.median() > 0.5 else 1) for x, _ in tensors])
    model = UNet.from_config(weights.NUCLEI_CONFIG)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimiser = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, arguments.lr, arguments.steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        picks = rng.choice(len(tensors), arguments.batch, p=draw / draw.sum())
        batch = [crop(tensors[i][0], tensors[i][1], arguments.size, rng) for i in picks]
        x = torch.stack([x for x, _ in batch]).contiguous(memory_format=torch.channels_last)
        loss = segmentation_loss(model.train()(x), torch.stack([mask for _, mask in batch]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 300 == 0:
            mean, pooled = foreground_dice(model.eval(), val)
            print(
                f"step {step}: loss {loss.item():.3f}, validation Dice {mean:.4f} (mean of images), "
                f"{pooled:.4f} (pooled), {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    weights.save(model.half(), arguments.out)
    mean, pooled = foreground_dice(weights.load(arguments.out).eval(), val)
    print(f"{arguments.out}: validation Dice {mean:.4f} (mean of images), {pooled:.4f} (pooled)")


if __name__ == "__main__":
    main()
