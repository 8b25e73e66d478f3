"""Cross-entropy plus soft Dice, of logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import UNet


def segmentation_loss(logits: Tensor, target: Tensor, dice_weight: float = 1.0) -> Tensor:
    """Cross-entropy (binary, for one channel) plus ``dice_weight`` times soft Dice loss, in float32 or wider.

    Soft Dice as Milletari et al. (2016, arXiv:1606.04797), without their squares: for each image and
    foreground class, ``1 - (2 sum p y + 1) / (sum p + sum y + 1)``, then the mean.

    Args:
        logits: (N, C, H, W). With one channel, foreground is where it is above 0; else class 0 is background.
        target: (N, H, W) int64 classes.

    Returns:
        Scalar.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logits.shape[1] == 1:
        wanted = target[:, None].to(logits.dtype)
        entropy, p = F.binary_cross_entropy_with_logits(logits, wanted), logits.sigmoid()
    else:
        entropy, p = F.cross_entropy(logits, target), logits.softmax(1)[:, 1:]
        wanted = torch.stack([target == c for c in range(1, logits.shape[1])], 1).to(logits.dtype)
    pixels = (2, 3)
    dice = (2 * (p * wanted).sum(pixels) + 1) / (p.sum(pixels) + wanted.sum(pixels) + 1)
    return entropy + dice_weight * (1 - dice).mean()


@contextmanager
def ending_in_logits(model: UNet) -> Iterator[None]:
    """Within the block ``model`` has no final activation: a loss of probabilities near 0 or 1 would be inexact."""
    config = model.config
    model.config = dataclasses.replace(config, final_activation=None)
    try:
        yield
    finally:
        model.config = config
