"""examples/skip_connections.py: its networks and its boundary score."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastunet import train
from fastunet.reference import UNet
from fastunet.train.validate import validate

from .blobs import write_split


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / "skip_connections.py"
    spec = importlib.util.spec_from_file_location("skip_connections", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_hand(found: Tensor, truth: Tensor, tolerance: int) -> float:
    """Boundary F1, boundary pixel by boundary pixel."""

    def boundary(mask: Tensor) -> list[tuple[int, int]]:
        h, w = mask.shape
        near = ((1, 0), (-1, 0), (0, 1), (0, -1))
        outside = {(i, j) for i in range(h) for j in range(w) if not mask[i, j]}
        inside = [(i, j) for i in range(h) for j in range(w) if mask[i, j]]
        return [(i, j) for i, j in inside if any((i + d, j + e) in outside for d, e in near)]

    def share(of: list[tuple[int, int]], near: list[tuple[int, int]]) -> float:
        hits = [any(max(abs(i - k), abs(j - m)) <= tolerance for k, m in near) for i, j in of]
        return sum(hits) / max(1, len(of))

    precision, recall = share(boundary(found), boundary(truth)), share(boundary(truth), boundary(found))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("tolerance", [0, 1, 2])
def test_boundary_f1_is_the_definition(seed: int, example: ModuleType, tolerance: int) -> None:
    found, truth = torch.rand(19, 23) > 0.95, torch.rand(19, 23) > 0.95
    found[3:9, 4:12], truth[5:11, 0:7] = True, True  # the second touches the border, which is no boundary
    expected = by_hand(found, truth, tolerance)
    assert example.boundary_f1(found, truth, tolerance) == pytest.approx(expected, abs=1e-6)


def test_boundary_f1_at_its_ends(example: ModuleType) -> None:
    nothing, square = torch.zeros(9, 9, dtype=torch.bool), torch.zeros(9, 9, dtype=torch.bool)
    square[3:6, 3:6] = True
    assert example.boundary_f1(square, square) == 1
    assert example.boundary_f1(nothing, square) == 0
    assert example.boundary_f1(nothing, nothing) != example.boundary_f1(nothing, nothing)  # NaN


def test_concat_is_the_reference_and_the_others_are_not(seed: int, example: ModuleType) -> None:
    reference, x = UNet.from_config(example.CONFIG).eval(), torch.rand(1, 1, 37, 50)
    concat = example.SkipUNet("concat").eval()
    concat.load_state_dict(reference.state_dict())
    assert torch.equal(concat(x), reference(x))
    counts = {}
    for skip in example.SKIPS:
        model = example.SkipUNet(skip)
        assert model(x).shape == (1, 2, 37, 50)
        counts[skip] = sum(p.numel() for p in model.parameters())
    assert counts["concat"] > counts["add"] == counts["none"]


@pytest.mark.parametrize(("skip", "read"), [("concat", True), ("add", True), ("none", False)])
def test_only_with_skips_the_encoder_reaches_the_decoder_directly(
    seed: int, example: ModuleType, skip: str, read: bool
) -> None:
    model, x = example.SkipUNet(skip).eval(), torch.rand(1, 1, 32, 32)
    before = model(x)
    model.downs[0].register_forward_hook(lambda module, inputs, output: (output[0], output[1] + 1))
    assert torch.equal(model(x), before) is not read


@pytest.mark.parametrize("skip", ["concat", "none"])
def test_the_network_that_is_scored_is_the_one_of_the_curve(
    seed: int, example: ModuleType, tmp_path: Path, skip: str
) -> None:
    data = train.find(write_split(tmp_path, np.random.default_rng(seed)), 1, 2)
    model, last = example.trained(skip, data, steps=3, seed=1)
    scores = validate(model, data, 1.0, train.Processes(torch.device("cpu")))
    assert scores.loss == pytest.approx(last.val_loss, rel=1e-6)  # of the latest weights it is another


def test_images_too_small_to_show_are_said_before_anything_is_trained(
    seed: int, example: ModuleType, tmp_path: Path, monkeypatch, capsys
) -> None:
    folder = write_split(tmp_path / "data", np.random.default_rng(seed))
    monkeypatch.setattr("sys.argv", ["skip_connections.py", str(folder), "--out", str(tmp_path / "a.png")])
    with pytest.raises(SystemExit):
        example.main()
    assert "data: expected a validation image of at least 128x128 pixels" in capsys.readouterr().err


def test_the_example_from_data_to_picture(seed: int, example: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    folder, out = write_split(tmp_path / "data", np.random.default_rng(seed)), tmp_path / "a.png"
    monkeypatch.setattr(example, "SHOWN", 32)
    words = ["skip_connections.py", str(folder), "--out", str(out), "--steps", "2", "--seeds", "2"]
    monkeypatch.setattr("sys.argv", words)
    example.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "%" not in line]
    table = {row[0]: row[1:] for row in rows if row[0] in ("concat", "add", "none")}
    assert list(table) == ["concat", "add", "none"]
    for parameters, *scores in table.values():
        assert int(parameters.replace(",", "")) > 0
        for score in scores:
            mean, low, high = (float(number) for number in re.findall(r"[01]\.\d+", score))
            assert 0 <= low <= mean <= high <= 1
    with Image.open(out) as picture:
        assert picture.format == "PNG" and min(picture.size) > 200
