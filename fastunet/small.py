"""Which networks are too small for a CPU to gain by the operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from .config import UNetConfig
from .trace import totals, trace

# Multiply-adds in a layer, on average, from which a CPU gains by the operators, as measured (benchmarks/NOTES.md).
LEAST_WORK, LEAST_WORK_IN_16_BITS = 5e6, 3e5


def is_small(config: UNetConfig, input_size: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether layers of (N, C, H, W) inputs are too small for a CPU to gain by operators of ours."""
    n, _, h, w = input_size
    return n * _work(config, h, w) < (LEAST_WORK_IN_16_BITS if dtype.itemsize == 2 else LEAST_WORK)


@lru_cache
def _work(config: UNetConfig, height: int, width: int) -> float:
    """Multiply-adds of a layer for one image, on average."""
    try:
        layers = trace(config, height, width)
    except ValueError:  # sizes that a subclass takes, and no network of ours
        return math.inf
    return totals(layers)[1] / 2 / len(layers)
