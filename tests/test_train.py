"""The trainer, against hand-computed values, against itself uninterrupted, and on bad data."""

from __future__ import annotations

import csv
import dataclasses
import errno
import math
import os
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import Tensor
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from fastunet import FastUNet, UNetConfig, dispatch, train, weights
from fastunet.files import atomic_write
from fastunet.images import normalise, read_image
from fastunet.predict import predict_mask
from fastunet.reference import UNet
from fastunet.train import Settings, checkpoint, curves, segmentation_loss
from fastunet.train.augment import Windows, indices, window
from fastunet.train.data import read_mask
from fastunet.train.validate import validate

from .blobs import write_pairs, write_split

CONFIG = UNetConfig(features=(4, 8), norm="batch")
KERNELS = UNetConfig(features=(2, 3), align_corners=False)
draw = curves.write_png
QUICK = Settings(steps=6, batch=2, size=16, every=2, ema=0.5)


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


def new_model(config: UNetConfig = CONFIG, kind: type[UNet] = FastUNet) -> UNet:
    torch.manual_seed(7)
    return kind.from_config(config)


# --- loss, schedule, metrics -----------------------------------------------------------------


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
        ("warmup", 1.0), ("dice_weight", -0.1), ("ema", 1.0), ("dtype", "fp8"), ("seed", -1),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got {re.escape(repr(value))}$"):
        Settings(**{name: value})


# --- data ------------------------------------------------------------------------------------


def test_split_folders_are_taken_as_they_are(folder: Path) -> None:
    data = train.find(folder, 1, 2)
    assert [pair.image_path.name for pair in data.train] == ["a.png", "b.png", "c.png", "d.png"]
    assert [pair.mask_path for pair in data.val] == [folder / "val" / "labels" / name for name in ("a.png", "b.png")]
    image, mask = data.train[1].read(2)
    label = np.asarray(Image.open(folder / "train" / "labels" / "b.png"))
    np.testing.assert_array_equal(mask, label > 0)
    np.testing.assert_array_equal(image, read_image(folder / "train" / "images" / "b.png"))


def test_masks_are_read_as_stored(tmp_path: Path) -> None:
    wanted = np.array([[0, 1, 2], [2, 0, 1]], np.uint8)
    palette = Image.fromarray(wanted)
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0] + [0] * 759)
    palette.save(tmp_path / "palette.png")
    Image.fromarray(np.stack([wanted] * 3, 2)).save(tmp_path / "grey.png")
    Image.fromarray(wanted > 0).save(tmp_path / "bits.png")
    tifffile.imwrite(tmp_path / "int32.tif", wanted.astype(np.int32))
    for name in ("palette.png", "grey.png", "int32.tif"):
        np.testing.assert_array_equal(read_mask(tmp_path / name, 3), wanted)
        np.testing.assert_array_equal(read_mask(tmp_path / name, 2), wanted > 0)
    np.testing.assert_array_equal(read_mask(tmp_path / "bits.png", 3), wanted > 0)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.png"])  # told by its content, as images are
def test_a_mask_in_a_jpeg_is_refused(folder: Path, name: str) -> None:
    labels = folder / "train" / "labels"
    label = np.asarray(Image.open(labels / "a.png"))
    (labels / "a.png").unlink()
    Image.fromarray((label > 0).astype(np.uint8) * 255).save(labels / name, format="JPEG")
    with pytest.raises(train.DataError) as caught:
        train.find(folder, 1, 2)
    assert caught.value.problems == [
        f"{labels / name}: a JPEG, whose compression changes classes; expected a mask in a PNG or TIFF"
    ]


def test_plain_pairs_are_split_the_same_way_every_time(rng: np.random.Generator, tmp_path: Path) -> None:
    write_pairs(tmp_path, rng, 10, masks="masks")
    (tmp_path / "masks" / "a.png").rename(tmp_path / "masks" / "a_mask.png")  # as fastunet segment names them
    data = train.find(tmp_path, 1, 2, val_fraction=0.25)
    assert (len(data.train), len(data.val)) == (7, 3)
    names = [[pair.image_path.stem for pair in pairs] for pairs in (data.train, data.val)]
    assert sorted(sum(names, [])) == list("abcdefghij")
    assert all(pair.mask_path.stem in (pair.image_path.stem, f"{pair.image_path.stem}_mask") for pair in data.train)
    again = train.find(tmp_path, 1, 2, val_fraction=0.25)
    assert names == [[pair.image_path.stem for pair in pairs] for pairs in (again.train, again.val)]
    assert data.fingerprint() == again.fingerprint()
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "images" / "b.png")
    Image.fromarray(np.ones((20, 20), np.uint8)).save(tmp_path / "masks" / "b.png")
    assert data.fingerprint() != train.find(tmp_path, 1, 2, val_fraction=0.25).fingerprint()


def test_everything_wrong_is_said_at_once_by_file(folder: Path) -> None:
    images, labels = folder / "train" / "images", folder / "train" / "labels"
    (images / "a.png").write_bytes(b"no image")
    Image.fromarray(np.ones((9, 9), np.uint16)).save(labels / "b.png")
    (labels / "c.png").unlink()
    (images / "d.png").rename(images / "e.png")
    whole = (folder / "val" / "labels" / "a.png").read_bytes()
    (folder / "val" / "labels" / "a.png").write_bytes(whole[: len(whole) // 2])
    colours = np.stack([np.full((41, 49), level, np.uint8) for level in (1, 2, 3)], 2)
    Image.fromarray(colours).save(folder / "val" / "labels" / "b.png")
    with pytest.raises(train.DataError) as caught:
        train.find(folder, 1, 2)
    assert sorted(caught.value.problems) == sorted(
        [
            f"{images / 'a.png'}: not an image, expected a PNG, JPEG or TIFF",
            f"{labels / 'b.png'}: expected the 41x49 pixels of its image, got 9x9",
            f"{images / 'c.png'}: has no mask in {labels}",
            f"{images / 'e.png'}: has no mask in {labels}",
            f"{labels / 'd.png'}: has no image in {images}",
            next(p for p in caught.value.problems if p.startswith(f"{folder / 'val' / 'labels' / 'a.png'}: cannot be")),
            f"{folder / 'val' / 'labels' / 'b.png'}: expected a mask of one plane, got an array of shape (41, 49, 3)",
        ]
    )


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda f: [p.unlink() for p in (f / "val" / "images").iterdir()], "val/images: no images in this folder"),
        (lambda f: (f / "val" / "labels").rename(f / "val" / "labelling"), "val/labels: no such folder"),
        (lambda f: (f / "val").rename(f / "validation"), "val/images: no such folder"),
        (lambda f: (f / "train").rename(f / "t") and (f / "val").rename(f / "v"), "data/images: no such folder"),
        (
            lambda f: np.save(f / "x", 0) or Image.fromarray(np.full((37, 52), np.nan, np.float32)).save(
                f / "val" / "images" / "a.png", format="TIFF"
            ),
            "val/images/a.png: expected finite values",
        ),
        (
            lambda f: [
                Image.fromarray(np.asarray(Image.open(p)) * 0).save(p) for p in (f / "val" / "labels").iterdir()
            ],
            "val: no mask has any foreground",
        ),
        (
            lambda f: (f / "val" / "images" / "a.jpg").write_bytes((f / "val" / "images" / "a.png").read_bytes()),
            "val/images/a.png: has the same name as a.jpg",
        ),
    ],
    ids=["empty", "no-masks", "no-val", "nothing", "nan", "no-foreground", "twice"],
)  # fmt: skip
def test_unusable_data(folder: Path, spoil: Callable[[Path], Any], problem: str) -> None:
    spoil(folder)
    with pytest.raises(train.DataError) as caught:
        train.find(folder, 1, 2)
    assert any(f"/{line}".find(f"/{problem}") >= 0 for line in caught.value.problems), caught.value.problems


def test_classes_the_network_does_not_have_are_reported(folder: Path) -> None:
    with pytest.raises(train.DataError) as caught:
        train.find(folder, 1, 4)  # discs are numbered 1 to 4
    assert len(caught.value.problems) == 6
    assert all("expected classes 0 to 3, got 0 to 4" in line for line in caught.value.problems)


def test_data_too_large_to_keep_is_read_again(folder: Path, data: train.Data, monkeypatch) -> None:
    monkeypatch.setattr("fastunet.train.data.MEMORY", 3 * 37 * 52)
    lean = train.find(folder, 1, 2)
    assert [pair.kept is None for pair in lean.train] == [False, True, True, True]
    for ours, theirs in zip(Windows(lean, 16, 0)[3, 0, 8], Windows(data, 16, 0)[3, 0, 8], strict=True):
        assert torch.equal(ours, theirs)


def test_windows_are_functions_of_seed_step_and_place(data: train.Data) -> None:
    whole, mask = Windows(data, 16, 5)[2, 0, 4]
    assert (whole.shape, whole.dtype, mask.shape, mask.dtype) == (
        (4, 1, 16, 16),
        torch.float32,
        (4, 16, 16),
        torch.long,
    )
    parts = [Windows(data, 16, 5)[index][0] for rank in (0, 1) for index in indices(2, 3, 4, rank, 2)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, Windows(data, 16, 6)[2, 0, 4][0])
    assert not torch.equal(whole, Windows(data, 16, 5)[3, 0, 4][0])
    assert not torch.equal(whole[0], whole[1])


def test_a_window_keeps_mask_and_image_together(rng: np.random.Generator, data: train.Data) -> None:
    """Discs are bright: in every window, whatever its turn, pixels inside outshine those outside."""
    turned = set()
    for draw in range(40):
        x, y = window(data.train[0], 24, 3, 2, np.random.default_rng([draw, int(rng.integers(2**31))]))
        assert x.shape == (3, 24, 24)
        assert set(y.unique().tolist()) <= {0, 1}
        if 20 < y.sum() < 500:
            assert x[0][y == 1].mean() > x[0][y == 0].mean() + 0.3
            turned.add(tuple(y.flatten().tolist()))
    assert len(turned) > 5


# --- fit -------------------------------------------------------------------------------------


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
    settings = Settings(steps=3, batch=2, size=16, every=3, ema=0.5, warmup=0.0, lr=1e-3, weight_decay=0.1)
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
        average = [0.5 * a + 0.5 * p for a, p in zip(average, now, strict=True)] if average else now
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


def files_of(out: Path) -> dict[str, Any]:
    """All that a run left, but for its speed."""
    state = torch.load(out / "last.pt", weights_only=True)
    for point in state["points"]:
        del point["images_per_second"]
    with (out / "curve.csv").open() as file:
        rows = [{**row, "images_per_second": ""} for row in csv.DictReader(file)]
    files = {name: (out / name).read_bytes() for name in ("best.safetensors", "last.safetensors")}
    return {"state": state, "rows": rows, **files}


def assert_same(a: Any, b: Any) -> None:
    """Equal to the bit, tensors inside dictionaries and lists too."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


class Stop(Exception):
    pass


def stop_at(last: int) -> Callable[[int, Tensor], None]:
    def on_step(step: int, loss: Tensor) -> None:
        if step == last:
            raise Stop

    return on_step


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_resume_is_bit_exact(data: train.Data, tmp_path: Path, dtype: str) -> None:
    settings = dataclasses.replace(QUICK, dtype=dtype)
    train.fit(new_model(), data, tmp_path / "whole", settings)
    with pytest.raises(Stop):  # in the interval after the second checkpoint
        train.fit(new_model(), data, tmp_path / "parts", settings, on_step=stop_at(5))
    assert torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["step"] == 4
    torch.manual_seed(99)  # another process has other random numbers, and another model to begin with
    train.fit(FastUNet.from_config(CONFIG), data, tmp_path / "parts", settings, resume=True, workers=1)
    assert_same(files_of(tmp_path / "parts"), files_of(tmp_path / "whole"))


@pytest.mark.parametrize("write", range(5))
def test_a_kill_between_any_two_files_of_a_checkpoint_costs_nothing(
    data: train.Data, tmp_path: Path, monkeypatch, write: int
) -> None:
    train.fit(new_model(), data, tmp_path / "whole", QUICK)
    replace, calls = os.replace, []

    def dies(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) > 5 + write:  # the first checkpoint writes all five, the second perhaps no best
            raise Stop
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(Stop):
        train.fit(new_model(), data, tmp_path / "parts", QUICK)
    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / "parts" / ".0123456789abcdef.tmp").write_bytes(b"half a file")  # what a kill would leave
    for name in ("best.safetensors", "last.safetensors"):
        weights.load(tmp_path / "parts" / name)
    assert torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["step"] in (2, 4)
    train.fit(new_model(), data, tmp_path / "parts", QUICK, resume=True)
    assert_same(files_of(tmp_path / "parts"), files_of(tmp_path / "whole"))
    assert len(list((tmp_path / "parts").iterdir())) == 5


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors", "curve.csv", "curve.png", "last.pt"])
def test_a_file_that_cannot_be_written_is_named_and_was_not_touched(
    data: train.Data, tmp_path: Path, monkeypatch, name: str
) -> None:
    train.fit(new_model(), data, tmp_path / "whole", QUICK)
    replace, calls = os.replace, []

    def full(source: Path, target: Path) -> None:
        calls.append(target.name)
        if calls.count(name) == (1 if name == "best.safetensors" else 2):  # the second may not be better
            no_space()
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    out = tmp_path / "out"
    with pytest.raises(train.TrainingError, match=f"^{out / name}: cannot be written \\(No space left on device\\)$"):
        train.fit(new_model(), data, out, QUICK)
    assert not list(out.glob(".*"))
    monkeypatch.setattr(os, "replace", replace)
    train.fit(new_model(), data, out, QUICK, resume=True)
    assert_same(files_of(out), files_of(tmp_path / "whole"))


def test_a_full_disk_is_said_to_be_one(data: train.Data, tmp_path: Path, monkeypatch) -> None:
    """However late: torch's archive has an error of its own for a write that fails within it."""
    resource = pytest.importorskip("resource")  # not on Windows
    small = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(checkpoint.weights, "save", lambda model, path: None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, small[1]))
    try:
        with pytest.raises(train.TrainingError, match=r"last.pt: cannot be written \(File too large\)$"):
            train.fit(new_model(), data, tmp_path, QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, small)
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob(".*"))


def test_a_folder_that_is_read_only_is_found_before_the_first_step(
    data: train.Data, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", no_space)  # the permissions of a folder do not stop root
    with pytest.raises(train.TrainingError, match=f"^{tmp_path}: cannot be written to"):
        train.fit(new_model(), data, tmp_path, QUICK, on_step=lambda *_: pytest.fail("began"))


def test_a_run_is_not_overwritten_nor_continued_as_another(folder: Path, data: train.Data, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        train.fit(new_model(), data, out, QUICK, on_step=stop_at(3))
    before = files_of(out)
    with pytest.raises(train.TrainingError, match=f"^{out}: holds a run; resume it"):
        train.fit(new_model(), data, out, QUICK)
    with pytest.raises(train.TrainingError, match=f"^lr: the run in {out} has 0.002, got 0.001$"):
        train.fit(new_model(), data, out, dataclasses.replace(QUICK, lr=1e-3), resume=True)
    with pytest.raises(train.TrainingError, match="^config: the run in"):
        train.fit(new_model(UNetConfig(features=(4, 9), norm="batch")), data, out, QUICK, resume=True)
    mask = folder / "train" / "labels" / "c.png"
    as_it_was, corrected = mask.read_bytes(), np.asarray(Image.open(mask)).copy()
    corrected[0, 0] = 0 if corrected[0, 0] else 1
    Image.fromarray(corrected).save(mask)
    with pytest.raises(train.TrainingError, match="^data: the run in .* has other images or masks"):
        train.fit(new_model(), train.find(folder, 1, 2), out, QUICK, resume=True)
    mask.write_bytes(as_it_was)
    assert train.find(folder, 1, 2).fingerprint() == data.fingerprint()
    (folder / "val" / "images" / "b.png").unlink()
    (folder / "val" / "labels" / "b.png").unlink()
    with pytest.raises(train.TrainingError, match="^data: the run in"):
        train.fit(new_model(), train.find(folder, 1, 2), out, QUICK, resume=True)
    assert_same(files_of(out), before)
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:-100])
    with pytest.raises(train.TrainingError, match="last.pt: cannot be read"):
        train.fit(new_model(), data, out, QUICK, resume=True)


def test_resume_where_nothing_is_begins(data: train.Data, tmp_path: Path) -> None:
    train.fit(new_model(), data, tmp_path / "a", QUICK, resume=True)
    train.fit(new_model(), data, tmp_path / "b", QUICK)
    assert_same(files_of(tmp_path / "a"), files_of(tmp_path / "b"))


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


def test_wrong_data_for_the_model_is_refused(data: train.Data, tmp_path: Path) -> None:
    with pytest.raises(train.TrainingError, match="^data: expected 3 channels and 2 classes"):
        train.fit(UNet(3, 2, (4, 8)), data, tmp_path, QUICK)
    with pytest.raises(train.TrainingError, match="^batch: expected a multiple of the 3 processes, got 2"):
        train.fit(new_model(), data, tmp_path, QUICK, process=train.Processes(torch.device("cpu"), 0, 3))
    (tmp_path / "file").touch()
    with pytest.raises(train.TrainingError, match="file: cannot be written to"):
        train.fit(new_model(), data, tmp_path / "file", QUICK)
