"""Made-up data, and no pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastunet import train
from fastunet.files import atomic_write
from fastunet.train import curves

from ..blobs import write_split


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def folder(rng: np.random.Generator, tmp_path: Path) -> Path:
    return write_split(tmp_path / "data", rng)


@pytest.fixture
def data(folder: Path) -> train.Data:
    return train.find(folder, 1, 2)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch) -> None:
    """Drawing takes longer than all the rest."""

    def blank(path: Path, points: object) -> None:
        with atomic_write(path) as temporary:
            temporary.touch()

    monkeypatch.setattr(curves, "write_png", blank)
