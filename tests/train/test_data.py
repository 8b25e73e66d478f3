"""Folders of images and masks, good and bad, and windows of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fastunet import train
from fastunet.images import ImageError, read_image
from fastunet.train.augment import Windows, indices, window
from fastunet.train.data import Pair, read_mask

from ..blobs import write_pairs


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


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.png", "a.tif"])  # told by its content, as images are
def test_a_mask_in_a_jpeg_is_refused(folder: Path, name: str) -> None:
    labels = folder / "train" / "labels"
    label = np.asarray(Image.open(labels / "a.png"))
    (labels / "a.png").unlink()
    options = {"format": "TIFF", "compression": "jpeg"} if name == "a.tif" else {"format": "JPEG"}
    Image.fromarray((label > 0).astype(np.uint8) * 255).save(labels / name, **options)
    with pytest.raises(train.DataError) as caught:
        train.find(folder, 1, 2)
    assert caught.value.problems == [
        f"{labels / name}: a JPEG, whose compression changes classes; expected a mask in a PNG or TIFF"
    ]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_a_compressed_tiff_is_read_as_images_are(tmp_path: Path, dtype: type) -> None:
    wanted = np.arange(12, dtype=dtype).reshape(3, 4) % 5
    Image.fromarray(wanted).save(tmp_path / "a.tif", compression="tiff_lzw")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif", 5), wanted)
    Image.fromarray(wanted).save(
        tmp_path / "b.tif", compression="tiff_lzw", save_all=True, append_images=[Image.fromarray(wanted)]
    )
    with pytest.raises(ImageError, match="b.tif: expected a mask of one plane"):
        read_mask(tmp_path / "b.tif", 5)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_as_its_image_is(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = (np.arange(12, dtype=np.uint8) % 5).reshape(3, 4)
    Image.fromarray(stored).save(tmp_path / f"a{suffix}", exif=exif)
    np.testing.assert_array_equal(read_mask(tmp_path / f"a{suffix}", 5), read_image(tmp_path / f"a{suffix}"))


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


def test_a_mask_that_is_no_image_is_said_as_of_an_image(folder: Path) -> None:
    (folder / "val" / "labels" / "a.png").write_bytes(b"")
    with pytest.raises(train.DataError, match=r"val/labels/a\.png: not an image, expected a PNG or TIFF$"):
        train.find(folder, 1, 2)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda f: [p.unlink() for p in (f / "val" / "images").iterdir()], "val/images: no images in this folder"),
        (
            lambda f: (f / "val" / "labels").rename(f / "val" / "labelling"),
            "val: expected labels/ or masks/ beside images/, got neither",
        ),
        (lambda f: (f / "val" / "masks").mkdir(), "val: expected labels/ or masks/ beside images/, got both"),
        (lambda f: (f / "val").rename(f / "validation"), "val/images: no such folder"),
        (lambda f: (f / "train").rename(f / "t") and (f / "val").rename(f / "v"), "data: expected images/ and masks/"),
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
    ids=["empty", "no-masks", "both", "no-val", "nothing", "nan", "no-foreground", "twice"],
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


def test_images_that_are_not_read_are_said(folder: Path) -> None:
    """Formats that Pillow would know, and a link to nothing; notes beside the images are none of our business."""
    images = folder / "train" / "images"
    for name in ("z.bmp", ".hidden.bmp", "notes.txt"):
        (images / name).write_bytes(b"BM")
    (images / "broken.png").symlink_to(folder / "nowhere.png")
    with pytest.raises(train.DataError) as caught:
        train.find(folder, 1, 2)
    assert sorted(caught.value.problems) == sorted(
        [
            f"{images / 'z.bmp'}: expected a PNG, JPEG or TIFF",
            f"{images / 'broken.png'}: has no mask in {images.parent / 'labels'}",
        ]
    )


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


@pytest.fixture
def levels(monkeypatch) -> Pair:
    """Grey levels 0 and 0.5 side by side, 1 below them; a window is all of it."""
    monkeypatch.setattr("fastunet.train.augment.ZOOM", (1.0, 1.0))
    image = np.zeros((16, 16), np.uint8)
    image[:8, 8:], image[8:] = 50, 100
    mask = np.zeros((16, 16), np.uint8)
    mask[:8, 8:], mask[8:] = 1, 2
    return Pair(Path("a.png"), Path("a.png"), (16, 16), (0.0, 100.0), ("", ""), (image, mask))


def test_windows_show_all_eight_symmetries(levels: Pair, seed: int) -> None:
    image, mask = levels.read(3)
    turned = [np.rot90(m, turns) for m in (mask, mask[:, ::-1]) for turns in range(4)]
    seen = np.zeros(8, int)
    for draw in range(160):
        _, y = window(levels, 16, 1, 3, np.random.default_rng([seed, draw]))
        seen += [np.array_equal(y, m) for m in turned]
    assert seen.sum() == 160
    assert seen.min() > 3  # of 20 expected


def test_plain_windows_are_the_image_turned(levels: Pair, rng: np.random.Generator) -> None:
    """Every grey level as it is, and no zoom: each is a part of the image in one of eight symmetries."""
    whole = rng.permutation(33 * 21).reshape(33, 21).astype(np.float32)
    kept = whole, (whole > 300).astype(np.uint8)
    pair = dataclasses.replace(levels, shape=whole.shape, limits=(0.0, 693.0), kept=kept)
    for draw in range(20):
        x, y = window(pair, 16, 1, 2, np.random.default_rng([draw, int(rng.integers(2**31))]), plain=True)
        values = (x[0] * 693).round()
        assert torch.equal(y, (values > 300).long())
        rows, columns = np.divmod([np.flatnonzero(whole == v)[0] for v in values.flatten()], 21)
        assert np.ptp(rows) == np.ptp(columns) == 15 and len({*zip(rows, columns, strict=True)}) == 256
        neighbours = np.abs(np.diff(rows.reshape(16, 16))) + np.abs(np.diff(columns.reshape(16, 16)))
        assert (neighbours == 1).all()


def test_the_last_steps_are_plain(data: train.Data) -> None:
    settings = train.Settings(steps=10, plain=0.3)
    assert settings.plain_from == 7
    assert [train.Settings(steps=10, plain=share).plain_from for share in (0, 1)] == [10, 0]
    varied, plain, mixed = (Windows(data, 16, 5, step) for step in (None, 0, settings.plain_from))
    assert torch.equal(mixed[6, 0, 4][0], varied[6, 0, 4][0])
    assert torch.equal(mixed[7, 0, 4][0], plain[7, 0, 4][0])
    assert not torch.equal(plain[7, 0, 4][0], varied[7, 0, 4][0])


def test_windows_vary_in_gamma_gain_offset_and_noise(levels: Pair, seed: int) -> None:
    """Each by as much as it is meant to, so that none is lost and none explains another."""
    found = []
    for draw in range(400):
        x, y = window(levels, 16, 1, 3, np.random.default_rng([seed, draw]))
        dark, half, full = (x[0][y == level].double() for level in range(3))
        offset, gain = dark.mean(), full.mean() - dark.mean()
        gamma = ((half.mean() - offset) / gain).clamp(1e-3).log() / np.log(0.5)
        found.append([gamma.log(), gain.log(), offset, dark.std()])
    gamma, gain, offset, noise = torch.tensor(found).T
    for values, deviation in ((gamma, 0.3), (gain, 0.15), (offset, 0.03), (noise, 0.02 * (1 - 2 / np.pi) ** 0.5)):
        assert deviation / 1.3 < values.std() < deviation * 1.3
    assert all(values.mean().abs() < 0.08 for values in (gamma, gain, offset))
