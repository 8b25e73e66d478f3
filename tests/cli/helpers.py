"""Images and processes for the tests of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import fastunet


def draw(path: Path, rng: np.random.Generator, size: tuple[int, ...] = (20, 31)) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(path)
    return path


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def process(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(fastunet.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
