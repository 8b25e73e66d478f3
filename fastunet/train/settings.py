"""What decides the result of a run, and what can be wrong with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..config import UNetConfig

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TrainingError(ValueError):
    """A run that cannot start, or whose files cannot be written; the message is one line."""


class DivergedError(TrainingError):
    """A run whose loss or weights became NaN or infinite; its files are those of the last point."""


@dataclass(frozen=True)
class Settings:
    """What, besides data and initial weights, decides the result of a run.

    Args:
        steps: of the optimiser.
        batch: windows a step, over all processes together.
        size: side of a window in pixels, after zoom.
        lr: the highest learning rate, of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101).
        weight_decay: of AdamW.
        warmup: share of the steps over which the rate rises in a line; then it falls along half a cosine.
        dice_weight: of the soft Dice loss beside cross-entropy; 0 leaves cross-entropy alone.
        plain: share of the steps, the last ones, whose windows are turned and flipped alone, not zoomed nor exposed
            otherwise: what is learnt then is of images as they are (Ge et al. 2021, arXiv:2107.08430, end so too).
        ema: decay, a step, of the averaged weights, which are validated and saved; 0 for the latest ones. At first it
            is less, as of TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``.
        every: steps between two validations, each with a checkpoint.
        dtype: "fp32", "bf16" or "fp16", the latter two under autocast; fp16 with a loss scale.
        seed: of the windows.

    Raises:
        ValueError: names the setting, its value and what was expected.
    """

    steps: int = 3600
    batch: int = 4
    size: int = 192
    lr: float = 2e-3
    weight_decay: float = 1e-3
    warmup: float = 0.1
    dice_weight: float = 1.0
    plain: float = 0.0
    ema: float = 0.99
    every: int = 100
    dtype: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "size", "every"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive integer, got {getattr(self, name)!r}")
        for name, low, high, expected in (
            ("lr", math.ulp(0), math.inf, "a positive number"),
            ("weight_decay", 0, math.inf, "a number of at least 0"),
            ("warmup", 0, 1, "a number in [0, 1)"),
            ("dice_weight", 0, math.inf, "a number of at least 0"),
            ("plain", 0, math.nextafter(1, 2), "a number in [0, 1]"),
            ("ema", 0, 1, "a number in [0, 1)"),
        ):
            if not low <= getattr(self, name) < high:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(repr, DTYPES))}, got {self.dtype!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer in [0, 2**63), got {self.seed!r}")

    def check(self, config: UNetConfig) -> None:
        """Raise TrainingError unless a network of ``config`` can be trained on windows of ``size``."""
        if config.padding == "valid":
            raise TrainingError("config: expected padding='same', whose output covers the whole window, got 'valid'")
        least = config.minimum_size * (2 if config.norm else 1)  # a norm needs more than one pixel at the bottleneck
        if self.size < least:
            raise TrainingError(f"size: expected at least {least} for this network, got {self.size}")
        # Strides take no other size, and skips that are cut make the output of any other smaller than the window.
        step = 1 if config.keeps_size else math.lcm(*config.reductions)
        if self.size % step:
            raise TrainingError(f"size: expected a multiple of {step} for this network, got {self.size}")

    @property
    def plain_from(self) -> int:
        """The first step of ``plain`` windows, counted from 0."""
        return self.steps - round(self.plain * self.steps)

    def decay(self, step: int) -> float:
        """Of the averaged weights behind ``step``, counted from 0: of few steps the initial weights would be most."""
        return min(self.ema, (1 + step) / (10 + step))

    def rate(self, step: int) -> float:
        """Learning rate of ``step``, counted from 0, as a share of ``lr``."""
        rise = round(self.warmup * self.steps)
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / (self.steps - rise)))
