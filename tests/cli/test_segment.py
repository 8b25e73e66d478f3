"""``fastunet segment``: what it writes, what it says, and how it fails."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastunet import images, weights
from fastunet.cli.segment import output_names
from fastunet.predict import predict_mask
from fastunet.reference import UNet

from .helpers import draw, listing, process

# --- segment: what it writes -----------------------------------------------------------------


def test_segment_writes_the_mask_and_the_overlay(run, model: UNet, file: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    done = run("segment", picture, "--out", out, "--weights", file)
    assert (done.code, done.err) == (0, "")
    assert listing(out) == {"cell_mask.png", "cell_overlay.png"}
    image = images.read_image(picture)
    mask = predict_mask(model, image)
    np.testing.assert_array_equal(images.read_image(out / "cell_mask.png"), mask * 255)
    np.testing.assert_array_equal(images.read_image(out / "cell_overlay.png"), images.overlay(image, mask))
    row = next(line for line in done.out.splitlines() if "cell.png" in line)
    assert "20x31" in row
    assert f"{(mask > 0).mean():.1%}" in row
    assert "cell_mask.png" in row
    assert "1 of 1 done" in done.out


@pytest.mark.parametrize(("classes", "values"), [(1, {0, 255}), (2, {0, 255}), (4, {0, 1, 2, 3})])
def test_mask_values(run, picture: Path, tmp_path: Path, classes: int, values: set[int]) -> None:
    torch.manual_seed(0)
    weights.save(UNet(1, classes, (4, 8)), tmp_path / "w.safetensors")
    assert run("segment", picture, "--out", tmp_path / "out", "--weights", tmp_path / "w.safetensors").code == 0
    written = images.read_image(tmp_path / "out" / "cell_mask.png")
    classes_found = predict_mask(weights.load(tmp_path / "w.safetensors"), images.read_image(picture))
    np.testing.assert_array_equal(written, classes_found * (255 if classes <= 2 else 1))
    assert set(np.unique(written).tolist()) <= values


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_segment_in_half_precision(run, file: Path, picture: Path, tmp_path: Path, dtype: str) -> None:
    done = run("segment", picture, "--out", tmp_path / "out", "--weights", file, "--dtype", dtype)
    assert (done.code, done.err) == (0, "")


def test_folders_are_sorted_not_entered_and_taken_once(run, rng, file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("b.png", "a.tif", "c.JPG", ".hidden.png"):
        draw(folder / name, rng)
    draw(folder / "deeper.png" / "d.png", rng)  # a folder named like an image
    (folder / "notes.txt").write_text("no image")
    done = run("segment", folder, folder / "b.png", "--out", tmp_path / "out", "--weights", file)
    assert (done.code, done.err) == (0, "")
    assert re.findall(r"(\w)_mask\.png", done.out) == ["a", "b", "c"]
    assert len(listing(tmp_path / "out")) == 6


def test_images_of_one_name_do_not_overwrite_each_other(run, rng, model: UNet, file: Path, tmp_path: Path) -> None:
    paths = [draw(tmp_path / name, rng) for name in ("p/cell.png", "q/cell.png", "p/cell.tif", "p/other.png")]
    out = tmp_path / "out"
    assert run("segment", *paths, "--out", out, "--weights", file).code == 0
    names = ["p_cell_png", "q_cell_png", "p_cell_tif", "other"]
    assert listing(out) == {f"{name}_{kind}.png" for name in names for kind in ("mask", "overlay")}
    for path, name in zip(paths, names, strict=True):
        expected = predict_mask(model, images.read_image(path)) * 255
        np.testing.assert_array_equal(images.read_image(out / f"{name}_mask.png"), expected)


@given(
    st.lists(
        st.builds(
            "/data/{}/{}.{}".format,
            st.sampled_from(["a", "b", "A", "a_b"]),
            st.sampled_from(["x", "X", "a_x", "x_png", "b_x_2", "{0}"]),
            st.sampled_from(["png", "tif", "PNG"]),
        ),
        unique=True,
        max_size=12,
    )
)
def test_output_names_are_distinct_and_plain_where_they_can_be(paths: list[str]) -> None:
    found = output_names([Path(path) for path in paths])
    assert len({name.casefold() for name in found}) == len(paths)
    stems = [Path(path).stem.casefold() for path in paths]
    for path, name in zip(paths, found, strict=True):
        if stems.count(Path(path).stem.casefold()) == 1:
            assert name == Path(path).stem


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x.png", "a/y.png"], ["x", "y"]),
        (["a/x.png", "a/x.tif"], ["x_png", "x_tif"]),
        (["a/x.png", "b/x.png"], ["a_x", "b_x"]),
        (["r/a/x.png", "s/a/x.png"], ["a_x_png", "a_x_png_2"]),
    ],
    ids=["distinct", "extension", "folder", "number"],
)
def test_output_names(paths: list[str], names: list[str]) -> None:
    assert output_names([Path(path) for path in paths]) == names


def test_file_names_are_not_markup(run, rng, file: Path, tmp_path: Path) -> None:
    picture = draw(tmp_path / "[red]:smile: a.png", rng)
    done = run("segment", picture, tmp_path / "[bold]none.png", "--out", tmp_path / "out", "--weights", file)
    assert "[red]:smile: a.png" in done.out
    assert "[bold]none.png" in done.err
    assert "[red]:smile: a_mask.png" in listing(tmp_path / "out")


def test_pillows_limit_does_not_stop_large_images(run, file: Path, picture: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    done = run("segment", picture, "--out", tmp_path / "out", "--weights", file)
    assert (done.code, done.err) == (0, "")


def test_the_nuclei_model_is_the_default(run, picture: Path, file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(weights, "NUCLEI", file)
    assert run("segment", picture, "--out", tmp_path / "out").code == 0
    monkeypatch.setattr(weights, "NUCLEI", tmp_path / "gone.safetensors")
    done = run("segment", picture, "--out", tmp_path / "out")
    assert done.code == 2
    assert "gone.safetensors" in done.err


# --- segment: how it fails -------------------------------------------------------------------


def test_every_bad_image_is_one_line_and_the_others_are_done(run, rng, file: Path, tmp_path: Path) -> None:
    folder, empty = tmp_path / "in", tmp_path / "empty"
    empty.mkdir()
    good = [draw(folder / "a.png", rng), draw(folder / "z.png", rng)]
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes(good[0].read_bytes()[:-300])
    images.tifffile.imwrite(folder / "nan.tif", np.full((9, 9), np.nan, np.float32))
    out = tmp_path / "out"
    done = run("segment", folder, tmp_path / "none.png", empty, "--out", out, "--weights", file)
    assert done.code == 1
    assert len(done.errors) == 5
    for path, reason in (
        (folder / "text.png", "not an image, expected a PNG, JPEG or TIFF"),
        (folder / "cut.png", "cannot be read (image file is truncated"),
        (folder / "nan.tif", "image: expected finite values, found NaN or infinity"),
        (tmp_path / "none.png", "no such file"),
        (empty, "no images in this folder (expected .png, .jpg, .jpeg, .tif, .tiff)"),
    ):
        line = next(line for line in done.errors if line.startswith(f"fastunet: {path}: "))
        assert reason in line
        assert line.count(str(path)) == 1
    assert listing(out) == {f"{name}_{kind}.png" for name in "az" for kind in ("mask", "overlay")}
    assert done.out.count("failed") == 5
    assert "2 of 7 done" in done.out


def test_an_input_is_never_overwritten(run, rng, file: Path, tmp_path: Path) -> None:
    image, truth = draw(tmp_path / "a.png", rng), draw(tmp_path / "a_mask.png", rng)
    before = truth.read_bytes()
    done = run("segment", image, truth, "--out", tmp_path, "--weights", file)
    assert done.code == 1
    assert done.errors == [f"fastunet: {image}: its output would overwrite the input {truth}"]
    assert truth.read_bytes() == before
    assert "a_mask_mask.png" in listing(tmp_path)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    run, rng, file: Path, tmp_path: Path, monkeypatch
) -> None:
    first, second = draw(tmp_path / "a.png", rng), draw(tmp_path / "b.png", rng)
    save = Image.Image.save
    calls = []

    def full(image: Image.Image, path: Path, **options) -> None:
        calls.append(path)
        if len(calls) == 1:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(image, path, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    done = run("segment", first, second, "--out", tmp_path / "out", "--weights", file)
    assert done.code == 1
    assert done.errors == [f"fastunet: {first}: [Errno 28] No space left on device"]
    assert listing(tmp_path / "out") == {"b_mask.png", "b_overlay.png"}


def missing(file: Path) -> tuple[Path, str]:
    return file.with_name("none.safetensors"), "no such file"


def cut(file: Path) -> tuple[Path, str]:
    path = file.with_name("cut.safetensors")
    path.write_bytes(file.read_bytes()[:-100])
    return path, "not a usable safetensors file"


def other_shape(file: Path) -> tuple[Path, str]:
    path = file.with_name("other.pt")
    torch.save(UNet(3, 2, (16, 32, 64, 128, 256), norm="batch").state_dict(), path)
    return path, "key 'downs.0.conv.net.0.weight' has shape (16, 3, 3, 3), expected (16, 1, 3, 3)"


def five_channels(file: Path) -> tuple[Path, str]:
    path = file.with_name("five.safetensors")
    weights.save(UNet(5, 2, (2, 2)), path)
    return path, "expected a model of 1 or 3 channels, got 5"


@pytest.mark.parametrize("broken", [missing, cut, other_shape, five_channels])
def test_bad_weights_start_nothing(run, file: Path, picture: Path, tmp_path: Path, broken) -> None:
    path, reason = broken(file)
    done = run("segment", picture, "--out", tmp_path / "out", "--weights", path)
    assert (done.code, done.out) == (2, "")
    assert len(done.errors) == 1
    assert done.err.startswith(f"fastunet: {path}: {reason}")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be(run, file: Path, picture: Path, tmp_path: Path) -> None:
    for out in (file, file / "below"):  # a file is in the way
        done = run("segment", picture, "--out", out, "--weights", file)
        assert (done.code, done.out, len(done.errors)) == (2, "", 1)
        assert done.err.startswith(f"fastunet: --out: cannot write to {out} (")


def test_an_output_folder_that_is_read_from(run, file: Path, picture: Path) -> None:
    done = run("segment", picture.parent, "--out", picture.parent, "--weights", file)
    assert (done.code, done.out) == (2, "")
    assert done.errors == [f"fastunet: --out: expected another folder than {picture.parent}, which is read"]
    assert listing(picture.parent) == {"cell.png"}


def test_ctrl_c(run, file: Path, picture: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastunet.cli.segment.predict_mask", interrupt)
    done = run("segment", picture, "--out", tmp_path / "out", "--weights", file)
    assert (done.code, done.errors) == (130, ["fastunet: interrupted"])
    assert listing(tmp_path / "out") == set()


def test_a_kill_while_writing_leaves_nothing(file: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = f"""
import time
from PIL import Image
from fastunet.cli import main

def slow(image, path, format):
    path.write_bytes(b"half")
    time.sleep(60)

Image.Image.save = slow
raise SystemExit(main(["segment", {str(picture)!r}, "--out", {str(out)!r}, "--weights", {str(file)!r}]))
"""
    child = process("-c", program)
    deadline = time.monotonic() + 60
    while not (out.is_dir() and list(out.glob(".*.tmp"))):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "fastunet: interrupted\n")
    assert listing(out) == set()
