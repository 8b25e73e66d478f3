"""What a run computes, and which it refuses."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from fastunet import FastUNet, UNetConfig, dispatch, train, weights
from fastunet.reference import UNet
from fastunet.train import Settings, curves, segmentation_loss
from fastunet.train.augment import Windows
from fastunet.train.validate import validate

from .runs import CONFIG, QUICK, Stop, files_of, new_model, stop_at

KERNELS = UNetConfig(features=(2, 3), align_corners=False)
draw = curves.write_png  # before it is replaced


def test_curves_are_a_table_and_a_picture(tmp_path: Path) -> None:
    points = [train.Point(2, 1e-3, 1.5, 1.25, 0.5, 0.25, 3.0), train.Point(4, 5e-4, 1.0, 1.125, 0.1, 0.2, 4.0)]
    draw(tmp_path / "curve.png", points)
    assert Image.open(tmp_path / "curve.png").size == (1080, 420)
    curves.write_csv(tmp_path / "curve.csv", points)
    assert (tmp_path / "curve.csv").read_text().splitlines() == [
        "step,lr,loss,val_loss,dice,mean_dice,images_per_second",
        "2,0.001,1.5,1.25,0.5,0.25,3.0",
        "4,0.0005,1.0,1.125,0.1,0.2,4.0",
    ]


def test_it_learns(data: train.Data, tmp_path: Path) -> None:
    model = new_model()
    points = train.fit(model, data, tmp_path / "out", Settings(steps=60, batch=4, size=32, every=20, lr=1e-2, ema=0.8))
    assert points[-1].loss < 0.6 * points[0].loss
    assert points[-1].dice > 0.9
    saved = weights.load(tmp_path / "out" / "best.safetensors")
    best = max(points, key=lambda point: point.dice)
    assert validate(saved, data, 1.0, train.Processes(torch.device("cpu")))[1] == pytest.approx(best.dice, abs=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernels_train_as_plain_pytorch_does(data: train.Data, tmp_path: Path, device: str, dtype: str) -> None:
    settings, losses = dataclasses.replace(QUICK, batch=1, size=8, every=4, lr=1e-2, dtype=dtype), {}
    process = train.Processes(torch.device(device))
    for implementation, kind in {"triton": FastUNet, "torch": UNet}.items():
        seen = losses[implementation] = []

        def keep(step: int, loss: Tensor, seen: list[float] = seen) -> None:
            seen.append(loss.item())
            stop_at(3)(step, loss)  # before validation, whose images take the interpreter minutes

        model = new_model(KERNELS, kind)
        with dispatch.forced(implementation), pytest.raises(Stop):
            train.fit(model, data, tmp_path / implementation, settings, process=process, on_step=keep)
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-4 if dtype == "fp32" else 3e-2)
    assert len(set(losses["torch"])) == 3


def test_a_step_is_adamw_on_the_mean_loss_and_the_average_decays(data: train.Data, tmp_path: Path) -> None:
    """Three steps done by hand on the reference network in float64."""
    config = dataclasses.replace(CONFIG, norm=None)
    truth = new_model(config, UNet).double()
    start = [p.detach().clone() for p in truth.parameters()]
    m, v = ([torch.zeros_like(p) for p in truth.parameters()] for _ in range(2))
    average: list[Tensor] = []
    settings = Settings(steps=3, batch=2, size=16, every=3, ema=0.2, warmup=0.0, lr=1e-3, weight_decay=0.1)
    seen: list[float] = []
    for step in range(3):
        x, y = Windows(data, 16, 0)[step, 0, 2]
        loss = segmentation_loss(truth(x.double()), y)
        seen.append(loss.item())
        gradients = torch.autograd.grad(loss, list(truth.parameters()))
        lr = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / 3))
        with torch.no_grad():
            for p, g, m_, v_ in zip(truth.parameters(), gradients, m, v, strict=True):
                m_.mul_(0.9).add_(0.1 * g)
                v_.mul_(0.999).add_(0.001 * g * g)
                p.mul_(1 - lr * 0.1)
                p -= lr * (m_ / (1 - 0.9 ** (step + 1))) / ((v_ / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        now = [p.detach().clone() for p in truth.parameters()]
        decay = (0.0, 2 / 11, 0.2)[step]  # of the second less than asked for
        average = [decay * a + (1 - decay) * p for a, p in zip(average, now, strict=True)] if average else now
    losses: list[float] = []
    model = new_model(config)
    train.fit(model, data, tmp_path, settings, on_step=lambda _, loss: losses.append(loss.item()))
    assert losses == pytest.approx(seen, rel=1e-5)
    moved = max((p - q).abs().max().item() for p, q in zip(truth.parameters(), start, strict=True))
    saved = weights.load(tmp_path / "last.safetensors").parameters()
    for p, q, a, b in zip(model.parameters(), truth.parameters(), saved, average, strict=True):
        # Adam divides by the gradient's size, which makes much of the rounding of small ones.
        assert (p.double() - q).abs().max() < 0.02 * moved
        assert (a.double() - b).abs().max() < 0.02 * moved


def test_a_run_that_diverges_stops_and_keeps_its_last_point(data: train.Data, tmp_path: Path) -> None:
    model = new_model()

    def poison(step: int, loss: Tensor) -> None:
        if step == 3:
            with torch.no_grad():
                model.head.weight.fill_(math.nan)

    with pytest.raises(train.DivergedError, match="NaN or infinite after 4 steps"):
        train.fit(model, data, tmp_path, QUICK, on_step=poison)
    assert files_of(tmp_path)["state"]["step"] == 2
    assert all(t.isfinite().all() for t in weights.read(tmp_path / "last.safetensors")[1].values())


def test_a_step_that_overflows_is_skipped_and_the_scale_falls(data: train.Data, tmp_path: Path) -> None:
    """As eager's GradScaler does: a scale of 2**16 on a loss whose gradients do not fit into float16."""
    model = new_model(dataclasses.replace(CONFIG, norm=None))
    with torch.no_grad():
        model.head.weight.mul_(300)
    before = [p.detach().clone() for p in model.parameters()]
    settings = Settings(steps=1, batch=2, size=16, every=1, dtype="fp16")
    train.fit(model, data, tmp_path, settings)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["scaler"]["scale"] == 2**15
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_starts_at_the_loss_of_float32(data: train.Data, tmp_path: Path, dtype: str) -> None:
    first: list[float] = []
    for name in ("fp32", dtype):
        losses: list[float] = []
        settings = dataclasses.replace(QUICK, dtype=name, steps=1)
        on_step: Callable[[int, Tensor], None] = lambda _, loss, losses=losses: losses.append(loss.item())
        train.fit(new_model(), data, tmp_path / name, settings, on_step=on_step)
        first.append(losses[0])
    assert first[0] != first[1]
    assert first[0] == pytest.approx(first[1], rel=0.02)


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({"norm": "batch"}, 3, "size: expected at least 4 for this network, got 3"),
        ({"norm": "instance"}, 3, "size: expected at least 4 for this network, got 3"),
        ({}, 1, "size: expected at least 2 for this network, got 1"),
        ({"downsample": "stride"}, 15, "size: expected a multiple of 2 for this network, got 15"),
        ({"match": "center_crop"}, 15, "size: expected a multiple of 2 for this network, got 15"),
        (
            {"downsample": "stride", "upsample": "transpose", "strides": ((2, 3),)},
            16,
            "size: expected a multiple of 6 for this network, got 16",
        ),
        (
            {"match": "center_crop", "padding": "valid"},
            16,
            "config: expected padding='same', whose output covers the whole window, got 'valid'",
        ),
    ],
)
def test_a_network_that_windows_of_this_size_cannot_train_is_refused(
    data: train.Data, tmp_path: Path, options: dict[str, Any], size: int, message: str
) -> None:
    model = new_model(UNetConfig(features=(4, 8), **options))
    with pytest.raises(train.TrainingError, match=f"^{re.escape(message)}$"):
        train.fit(model, data, tmp_path / "out", dataclasses.replace(QUICK, size=size))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"downsample": "stride"}, {"match": "center_crop"}])
def test_sizes_that_need_not_divide_are_those_of_images(
    data: train.Data, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = new_model(UNetConfig(features=(4, 8), **options))  # the images' sides are odd
    assert len(train.fit(model, data, tmp_path, QUICK)) == 3


def test_of_several_processes_one_says_what_several_have_to_say(monkeypatch) -> None:
    monkeypatch.setattr(train.Processes, "PATIENCE", timedelta(seconds=0.1))
    store, said = HashStore(), list[str]()
    several = [train.Processes(torch.device("cpu"), rank, 3, store) for rank in range(3)]
    for rank, text in ((2, "no file"), (0, "no file"), (1, "no folder"), (1, "no file")):
        several[rank].once(text, lambda rank=rank, text=text: said.append(f"{rank}: {text}"))
    assert said == ["2: no file", "1: no folder"]

    def dies() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        several[0].once("unsaid", dies)
    several[1].once("unsaid", lambda: said.append("after all"))
    assert said[2:] == ["after all"]


def test_a_running_statistic_that_is_lost_ends_the_run(data: train.Data, tmp_path: Path) -> None:
    """In train mode nothing is computed with it, so the loss knows nothing of it."""
    model = new_model()

    def lose(step: int, loss: Tensor) -> None:
        if step == 3:
            for buffer in model.buffers():
                buffer.fill_(torch.nan if buffer.is_floating_point() else 0)

    with pytest.raises(train.DivergedError, match="NaN or infinite after 4 steps"):
        train.fit(model, data, tmp_path, QUICK, on_step=lose)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2


def test_wrong_data_for_the_model_is_refused(data: train.Data, tmp_path: Path) -> None:
    with pytest.raises(train.TrainingError, match="^data: expected 3 channels and 2 classes"):
        train.fit(UNet(3, 2, (4, 8)), data, tmp_path, QUICK)
    with pytest.raises(train.TrainingError, match="^batch: expected a multiple of the 3 processes, got 2"):
        train.fit(new_model(), data, tmp_path, QUICK, process=train.Processes(torch.device("cpu"), 0, 3))
    (tmp_path / "file").touch()
    with pytest.raises(train.TrainingError, match="file: cannot be written to"):
        train.fit(new_model(), data, tmp_path / "file", QUICK)
