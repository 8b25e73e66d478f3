"""benchmarks/training.py: its networks, the table and the picture, on a few steps."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks import training

from ..blobs import write_split


def test_from_data_to_picture(seed, tmp_path, monkeypatch, capsys):
    folder, out = write_split(tmp_path / "data", np.random.default_rng(seed)), tmp_path / "curves.png"
    words = ["training.py", str(folder), "--all", "--out", str(out), "--steps", "4", "--seeds", "2", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", words)
    training.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    found = {(row[0], row[1]): row[2:] for row in rows[1:]}
    assert list(found) == [(s, name) for s in ("0", "1") for name in training.NETWORKS] + [
        ("all", name) for name in training.NETWORKS
    ] + [(f"from {training.PLAIN}", name) for name in training.NETWORKS if name != training.PLAIN]
    for run in ("0", "1"):
        none, *plain = found[run, training.PLAIN]
        assert float(none) == 0
        for name in (training.OURS, training.AGAIN):  # the losses of the same windows and weights
            gap, *other = found[run, name]
            assert 0 <= float(gap) < 1e-3
            assert float(other[0]) == pytest.approx(float(plain[0]), rel=1e-3)
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width > 2 * picture.height


def test_wrong_data_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["training.py", str(tmp_path / "none"), "--out", str(tmp_path / "a.png")])
    with pytest.raises(SystemExit, match="none"):
        training.main()
