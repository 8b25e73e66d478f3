"""A small model and an image for the commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastunet import weights
from fastunet.reference import UNet

from .helpers import draw


@pytest.fixture
def model(seed: int) -> UNet:
    return UNet(1, 2, (4, 8, 16), upsample="nearest").eval()


@pytest.fixture
def file(model: UNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    weights.save(model, path)
    return path


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def picture(rng: np.random.Generator, tmp_path: Path) -> Path:
    return draw(tmp_path / "in" / "cell.png", rng)
