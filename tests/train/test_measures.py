"""Loss, schedule, metrics and settings, against values by hand."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastunet import train, weights
from fastunet.images import normalise, read_image
from fastunet.predict import predict_mask
from fastunet.reference import UNet
from fastunet.train import Settings, segmentation_loss
from fastunet.train.validate import validate

from .runs import CONFIG, QUICK, new_model


@pytest.mark.parametrize("dice_weight", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_loss_is_the_formula(seed: int, classes: int, dice_weight: float) -> None:
    """Written out pixel by pixel, in Python's own floats."""
    logits = torch.randn(2, classes, 3, 5, dtype=torch.float64) * 3
    target = torch.randint(0, max(2, classes), (2, 3, 5))
    entropy, losses = 0.0, []
    for n in range(2):
        overlap, total = [0.0] * max(2, classes), [0.0] * max(2, classes)
        for row in range(3):
            for column in range(5):
                z, wanted = logits[n, :, row, column].tolist(), int(target[n, row, column])
                if classes == 1:
                    p = [1 / (1 + math.exp(z[0])), 1 / (1 + math.exp(-z[0]))]
                else:
                    p = [math.exp(value) / sum(map(math.exp, z)) for value in z]
                entropy -= math.log(p[wanted]) / 30
                for c in range(len(p)):
                    overlap[c] += p[c] * (wanted == c)
                    total[c] += p[c] + (wanted == c)
        losses += [1 - (2 * o + 1) / (t + 1) for o, t in zip(overlap[1:], total[1:], strict=True)]
    expected = entropy + dice_weight * sum(losses) / len(losses)
    assert segmentation_loss(logits, target, dice_weight).item() == pytest.approx(expected, rel=1e-12)


def test_loss_of_half_precision_is_taken_in_float32(seed: int) -> None:
    logits, target = torch.randn(1, 2, 300, 300).half() * 30, torch.zeros(1, 300, 300, dtype=torch.long)
    loss = segmentation_loss(logits, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(segmentation_loss(logits.double(), target).item(), rel=1e-5)


def test_rate_rises_in_a_line_then_falls_along_a_cosine() -> None:
    settings = Settings(steps=100, warmup=0.2)
    assert [settings.rate(step) for step in (0, 9, 19, 20)] == pytest.approx([1 / 21, 10 / 21, 20 / 21, 1.0])
    assert settings.rate(60) == pytest.approx(0.5)  # half way down
    assert settings.rate(40) == pytest.approx(0.5 + math.sqrt(0.125))
    assert 0 < settings.rate(99) < 0.001
    assert Settings(steps=1, warmup=0).rate(0) == 1
    assert Settings(steps=1, warmup=0.9).rate(0) == 0.5


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_scores_are_those_counted_by_hand(seed: int, folder: Path, classes: int) -> None:
    for path in (folder / "val" / "labels").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) % max(2, classes)).save(path)  # classes; 1 to 4 before
    data = train.find(folder, 1, classes) if classes != 3 else None
    if data is None:  # the training labels are instance numbers, which are no classes
        pairs = train.find(folder, 1, 2)
        data = train.Data(pairs.train, [], 1, 3)
        for pair in pairs.val:
            data.val.append(dataclasses.replace(pair, kept=None))
    model = UNet(1, classes, (4, 8)).eval()
    with torch.no_grad():
        model.head.weight.mul_(50)  # or all pixels would be of one class
    overlap, total, by_image = np.zeros(classes + 1), np.zeros(classes + 1), []
    losses = []
    for path in sorted((folder / "val" / "images").iterdir()):
        image, label = read_image(path), np.asarray(Image.open(folder / "val" / "labels" / path.name))
        found = predict_mask(model, image)
        values = range(1, max(2, classes))
        both = np.array([((found == c) & (label == c)).sum() for c in values])
        either = np.array([(found == c).sum() + (label == c).sum() for c in values])
        overlap[: len(both)] += both
        total[: len(both)] += either
        by_image.append(np.mean([2 * b / e for b, e in zip(both, either, strict=True) if e]))
        logits = model(normalise(image, 1)[None])
        losses.append(segmentation_loss(logits, torch.from_numpy(label.astype(np.int64))[None]).item())
    counted = total > 0
    scores = validate(model, data, 1.0, train.Processes(torch.device("cpu")))
    assert scores.dice == pytest.approx(np.mean(2 * overlap[counted] / total[counted]), abs=1e-6)
    assert scores.mean_dice == pytest.approx(np.mean(by_image), abs=1e-6)
    assert scores.loss == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("classes", [1, 3])
def test_a_final_sigmoid_changes_neither_loss_nor_dice(seed: int, folder: Path, tmp_path: Path, classes: int) -> None:
    """Trained and validated as the same network without it; what is saved has it, and finds what was counted."""
    pairs = train.find(folder, 1, 2)
    data = train.Data(pairs.train, pairs.val, 1, classes)  # of three classes the last is in no mask
    points, networks, losses = [], [], []
    for final in (None, "sigmoid"):
        model = new_model(dataclasses.replace(CONFIG, out_channels=classes, final_activation=final))
        out = tmp_path / str(final)
        on_step: Callable[[int, Tensor], None] = lambda _, loss: losses.append(loss.item())
        points.append(train.fit(model, data, out, QUICK, on_step=on_step)[-1])
        networks.append(weights.load(out / "last.safetensors"))
        assert model.config.final_activation == networks[-1].config.final_activation == final
    assert losses[:6] == losses[6:]
    for logits, probabilities in zip(dataclasses.astuple(points[0])[:-1], dataclasses.astuple(points[1]), strict=False):
        assert probabilities == pytest.approx(logits, abs=1e-6)
    for network, point in zip(networks, points, strict=True):
        found = [(predict_mask(network, pair.read(2)[0]), pair.read(2)[1]) for pair in data.val]
        dice = []
        for c in range(1, max(2, classes)):
            either = sum((a == c).sum() + (b == c).sum() for a, b in found)
            dice += [2 * sum(((a == c) & (b == c)).sum() for a, b in found) / either] if either else []
        assert point.dice == pytest.approx(np.mean(dice), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("batch", 1.5), ("size", -1), ("every", 0), ("lr", 0.0), ("lr", math.nan), ("weight_decay", -1),
        ("warmup", 1.0), ("dice_weight", -0.1), ("plain", 1.1), ("ema", 1.0), ("dtype", "fp8"), ("seed", -1),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got {re.escape(repr(value))}$"):
        Settings(**{name: value})
