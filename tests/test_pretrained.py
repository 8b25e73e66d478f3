"""The model that ships with the package does what its card says, on the sample that ships beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from fastunet import weights
from fastunet.images import read_image
from fastunet.predict import predict_mask

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_it_loads_with_the_configuration_that_is_assumed_for_it():
    config, state = weights.read(weights.NUCLEI)
    assert config == weights.NUCLEI_CONFIG
    assert all(t.isfinite().all() for t in state.values())


def test_it_finds_the_nuclei_of_the_sample():
    """The card says 0.88 to 0.98 for images of this kind; 0.5 is what marking everything would give."""
    found = predict_mask(weights.load(weights.NUCLEI), read_image(EXAMPLES / "nuclei.png")) > 0
    label = read_image(EXAMPLES / "nuclei_mask.png") > 0
    dice = 2 * np.logical_and(found, label).sum() / (found.sum() + label.sum())
    assert dice > 0.94


def test_the_demo_runs_and_ends_in_parity(tmp_path):
    run = subprocess.run([sys.executable, EXAMPLES / "demo.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    last = run.stdout.strip().splitlines()[-1]
    assert last.startswith("parity: "), run.stdout
    mask = read_image(tmp_path / "demo-output" / "nuclei_mask.png")
    assert mask.shape == read_image(EXAMPLES / "nuclei.png").shape
    assert set(np.unique(mask)) == {0, 255}
    assert read_image(tmp_path / "demo-output" / "nuclei_overlay.png").shape == (*mask.shape, 3)
