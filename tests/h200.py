"""As much of an H200 as a choice asks about, and a layer of it; the fixture ``hopper`` makes torch answer so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from fastunet import dispatch, kernels, ops

GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16
LAYER = "conv2d_relu", ((1, 64, 32, 32),), (64, 64, 3, 3)
KEY = "conv2d_relu 1x64x32x32 by 64x64x3x3 bfloat16"
CONFIG = kernels.hopper.hopper_configs((64,), 64, 1, 32, 32, BF16, ksize=3, pool=False)[0]
CONFIG_FIELDS = {field: getattr(CONFIG, field) for field in CONFIG.__dataclass_fields__}


def choice(**options) -> dispatch.Choice:
    return ops.choose(*LAYER, GPU, options.pop("dtype", BF16), **options)


def stand_in(*shape: int) -> Any:
    """As much of a tensor on a GPU as a choice asks about."""
    return SimpleNamespace(shape=torch.Size(shape), device=GPU, dtype=BF16)
