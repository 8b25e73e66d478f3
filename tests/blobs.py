"""Small made-up training data: bright discs on a dark, noisy ground."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_pairs(folder: Path, rng: np.random.Generator, count: int = 4, masks: str = "labels") -> None:
    """``count`` images ``a.png``, ``b.png``, ... of differing odd sizes, and their masks, in two folders."""
    for name in ("images", masks):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        h, w = 37 + 4 * number, 52 - 3 * number
        rows, columns = np.mgrid[:h, :w]
        label = np.zeros((h, w), np.uint16)
        for disc in range(1, 5):
            row, column = rng.integers(0, h), rng.integers(0, w)
            label[(rows - row) ** 2 + (columns - column) ** 2 < 36] = disc
        image = np.where(label > 0, 180, 40) + rng.normal(0, 10, (h, w))
        name = f"{'abcdefghij'[number]}.png"
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / name)
        Image.fromarray(label).save(folder / masks / name)


def write_split(folder: Path, rng: np.random.Generator) -> Path:
    """``train/`` of four pairs and ``val/`` of two."""
    write_pairs(folder / "train", rng, 4)
    write_pairs(folder / "val", rng, 2)
    return folder
