"""Random windows of the training images, each a function of (seed, step, place in the batch) alone.

So nothing about random numbers need be remembered to continue a run, workers may load in any
order, and several processes that share a batch draw what one would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..images import scale
from .data import Data, Pair

ZOOM = 0.7, 1.4  # so that objects of one microscope are seen at others' magnifications
AROUND_FOREGROUND = 0.25  # of the windows; where objects are a hundredth of the image, few would show one


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Batches of windows; item ``(step, first, last)`` holds places ``first`` to ``last - 1`` of a step's batch.

    Images are drawn in proportion to the square roots of their areas: a window sees less of a large one.
    From step ``plain_from`` on, if it is given, windows are turned and flipped alone.
    """

    def __init__(self, data: Data, size: int, seed: int, plain_from: int | None = None) -> None:
        self.data, self.size, self.seed, self.plain_from = data, size, seed, plain_from
        roots = np.sqrt([math.prod(pair.shape) for pair in data.train])
        self.odds = roots / roots.sum()

    def __getitem__(self, index: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Images (N, channels, size, size) float32 and classes (N, size, size) int64."""
        step, first, last = index
        plain = self.plain_from is not None and step >= self.plain_from
        windows = []
        for place in range(first, last):
            rng = np.random.default_rng([self.seed, step, place])
            pair = self.data.train[rng.choice(len(self.odds), p=self.odds)]
            windows.append(window(pair, self.size, self.data.channels, self.data.classes, rng, plain))
        images, masks = zip(*windows, strict=True)
        return torch.stack(images), torch.stack(masks)


def indices(first_step: int, steps: int, batch: int, rank: int, processes: int) -> Iterator[tuple[int, int, int]]:
    """What process ``rank`` asks of :class:`Windows`: its equal share of each step's batch."""
    share = batch // processes
    for step in range(first_step, steps):
        yield step, rank * share, (rank + 1) * share


def window(
    pair: Pair, size: int, channels: int, classes: int, rng: np.random.Generator, plain: bool = False
) -> tuple[Tensor, Tensor]:
    """A square window, zoomed to ``size``, under one of the eight symmetries of the square, at random exposure.

    ``plain``: as it is, but for the symmetry, and the zoom of an image that is smaller than ``size``.
    """
    image, mask = pair.read(classes)
    h, w = mask.shape
    side = max(1, min(size if plain else round(size * rng.uniform(*ZOOM)), h, w))
    top, left = int(rng.integers(0, h - side + 1)), int(rng.integers(0, w - side + 1))
    foreground = np.flatnonzero(mask) if rng.random() < AROUND_FOREGROUND else ()
    if len(foreground):
        row, column = divmod(int(foreground[rng.integers(len(foreground))]), w)
        top, left = min(max(row - side // 2, 0), h - side), min(max(column - side // 2, 0), w - side)
    x = scale(image[top : top + side, left : left + side], channels, pair.limits)[None]
    y = torch.from_numpy(mask[top : top + side, left : left + side].copy())[None, None]
    x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)[0]
    y = F.interpolate(y.float(), (size, size), mode="nearest-exact")[0, 0].long()
    turns = int(rng.integers(4))
    x, y = torch.rot90(x, turns, (1, 2)), torch.rot90(y, turns, (0, 1))
    if rng.random() < 0.5:
        x, y = x.flip(2), y.flip(1)
    if plain:
        return x.contiguous(), y.contiguous()
    # Brightness: gamma, gain, offset; then the noise of a camera.
    x = x ** math.exp(rng.normal(0, 0.3)) * math.exp(rng.normal(0, 0.15)) + rng.normal(0, 0.03)
    noise = rng.standard_normal(x.shape, dtype=np.float32) * np.float32(abs(rng.normal(0, 0.02)))
    return x + torch.from_numpy(noise), y.contiguous()
