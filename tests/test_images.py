"""Every kind of image file against the array it was written from, and refusals in one line."""

from __future__ import annotations

import math
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from fastunet.files import atomic_write
from fastunet.images import ImageError, normalise, overlay, read_image, write_png


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def pixels(rng: np.random.Generator, *shape: int, dtype: type = np.uint8) -> np.ndarray:
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def assert_reads(path: Path, expected: np.ndarray) -> None:
    found = read_image(path)
    assert found.dtype == expected.dtype
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, expected)


# --- reading: Pillow's formats ---------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3)], ids=["grey", "rgb"])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".PNG", ".data"])
def test_8_bit(rng: np.random.Generator, tmp_path: Path, shape: tuple[int, ...], suffix: str) -> None:
    image = pixels(rng, *shape)
    Image.fromarray(image).save(tmp_path / f"a{suffix}", format="TIFF" if suffix == ".tif" else "PNG")
    assert_reads(tmp_path / f"a{suffix}", image)


def test_16_bit_grey_png(rng: np.random.Generator, tmp_path: Path) -> None:
    image = pixels(rng, 7, 5, dtype=np.uint16)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert_reads(tmp_path / "a.png", image)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_dropped(rng: np.random.Generator, tmp_path: Path, mode: str) -> None:
    image = pixels(rng, 7, 5, len(mode))
    Image.fromarray(image, mode=mode).save(tmp_path / "a.png")
    assert_reads(tmp_path / "a.png", image[..., 0] if mode == "LA" else image[..., :3])


def test_1_bit(rng: np.random.Generator, tmp_path: Path) -> None:
    image = rng.random((7, 5)) > 0.5
    Image.fromarray(image).save(tmp_path / "a.png")
    assert_reads(tmp_path / "a.png", image.astype(np.uint8) * 255)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_palette(rng: np.random.Generator, tmp_path: Path, suffix: str) -> None:
    index, palette = pixels(rng, 7, 5), pixels(rng, 256, 3)
    image = Image.fromarray(index, mode="P")
    image.putpalette(palette.tobytes())
    image.save(tmp_path / f"a{suffix}")
    assert_reads(tmp_path / f"a{suffix}", palette[index])


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow: red
    image.save(tmp_path / f"a{suffix}")
    np.testing.assert_allclose(read_image(tmp_path / f"a{suffix}"), np.full((16, 16, 3), (255, 0, 0)), atol=6)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    """Against the meaning of the tag: where row 0 and column 0 of the stored pixels belong."""
    sides = {1: "TL", 2: "TR", 3: "BR", 4: "BL", 5: "LT", 6: "RT", 7: "RB", 8: "LB"}[orientation]
    stored = np.full((16, 32), 128, np.uint8)
    stored[:8, :8] = 0  # the corner of row 0 and column 0
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(stored).save(tmp_path / f"a{suffix}", exif=exif)
    found = read_image(tmp_path / f"a{suffix}")
    assert found.shape == ((16, 32) if sides[0] in "TB" else (32, 16))
    corner = found[0 if "T" in sides else -1, 0 if "L" in sides else -1]
    assert corner < 20
    assert (found > 100).mean() > 0.8


# --- reading: TIFF ---------------------------------------------------------------------------


@pytest.mark.parametrize("byteorder", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3)], ids=["grey", "rgb"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff(rng, tmp_path: Path, byteorder, dtype, shape, compression) -> None:
    image = pixels(rng, *shape, dtype=dtype)
    tifffile.imwrite(tmp_path / "a.tif", image, byteorder=byteorder, compression=compression)
    assert_reads(tmp_path / "a.tif", image)


def test_planar_tiff(rng: np.random.Generator, tmp_path: Path) -> None:
    image = pixels(rng, 3, 7, 5, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", planarconfig="separate")
    assert_reads(tmp_path / "a.tif", np.moveaxis(image, 0, -1))


def test_first_page_of_a_stack(rng: np.random.Generator, tmp_path: Path) -> None:
    image = pixels(rng, 4, 7, 5, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack")
    assert_reads(tmp_path / "a.tif", image[0])


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int16", "int32", "uint32", ">f4"])
def test_other_types_become_float32(rng: np.random.Generator, tmp_path: Path, dtype: str) -> None:
    image = (rng.random((7, 5)) * 1000).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", image)
    assert_reads(tmp_path / "a.tif", image.astype(np.float32))


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg"])
def test_compressions_that_only_libtiff_knows(rng: np.random.Generator, tmp_path: Path, compression: str) -> None:
    image = np.full((16, 16, 3), (200, 30, 90), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.tif", compression=compression)
    np.testing.assert_allclose(read_image(tmp_path / "a.tif"), image, atol=6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_zero(rng: np.random.Generator, tmp_path: Path, dtype: type) -> None:
    image = pixels(rng, 7, 5, dtype=dtype)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="miniswhite")
    assert_reads(tmp_path / "a.tif", np.iinfo(dtype).max - image)


@pytest.mark.parametrize("extra", [1, 2])
def test_tiff_alpha_and_stacks_of_channels(rng: np.random.Generator, tmp_path: Path, extra: int) -> None:
    image = pixels(rng, 7, 5, 3 + extra)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb")
    if extra == 1:
        assert_reads(tmp_path / "a.tif", image[..., :3])
    else:
        with pytest.raises(ImageError, match=r"expected one grey or RGB plane, got an array of shape \(7, 5, 5\)"):
            read_image(tmp_path / "a.tif")


def test_four_channels_of_a_microscope_are_not_rgba(rng: np.random.Generator, tmp_path: Path) -> None:
    image = pixels(rng, 7, 5, 4)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack", planarconfig="contig")
    with pytest.raises(ImageError, match=r"shape \(7, 5, 4\)"):
        read_image(tmp_path / "a.tif")


# --- reading: refusals -----------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(ImageError) as error:
        read_image(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_missing(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.png").endswith("no such file")
    assert refusal(tmp_path).endswith("no such file")


@pytest.mark.parametrize("content", [b"", b"hello", b"II*\0", b"MM", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a"])
def test_not_an_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "zlib.tif", "lzw.tif"])
def test_truncated(rng: np.random.Generator, tmp_path: Path, name: str, kept: float) -> None:
    image, path = pixels(rng, 64, 64), tmp_path / name
    if name == "zlib.tif":
        tifffile.imwrite(path, image, compression="zlib")
    elif name == "lzw.tif":
        Image.fromarray(image).save(path, compression="tiff_lzw")
    else:
        Image.fromarray(image).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    refusal(path)


def test_complex_pixels(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.ones((4, 4), np.complex64))
    assert "expected real pixels, got complex64" in refusal(tmp_path / "a.tif")


# --- normalise -------------------------------------------------------------------------------


def percentile(values: list[float], q: float) -> float:
    """The linear definition, by hand."""
    ordered, place = sorted(values), (len(values) - 1) * q / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.int32, np.bool_]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    )
)
def test_normalise_is_the_definition(image: np.ndarray) -> None:
    values = [float(np.float32(value)) for value in image.ravel()]
    low, high = percentile(values, 1), percentile(values, 99.8)
    if high <= low:
        low, high = min(values), max(values)
    expected = [min(max((v - low) / (high - low), 0), 1.5) if high > low else 0.0 for v in values]
    for channels in (1, 3):
        x = normalise(image, channels)
        assert x.shape == (channels, *image.shape)
        assert x.dtype == torch.float32
        for plane in x:
            np.testing.assert_allclose(plane.numpy().ravel(), expected, rtol=1e-5, atol=1e-6)


def test_colour_becomes_luma_or_stays(rng: np.random.Generator) -> None:
    image = pixels(rng, 40, 30, 3)
    luma = image.astype(np.float64) @ [0.299, 0.587, 0.114]
    torch.testing.assert_close(normalise(image, 1), normalise(luma, 1), rtol=1e-4, atol=1e-5)
    x = normalise(image, 3)
    low, high = np.percentile(image, [1, 99.8])
    np.testing.assert_allclose(x[2].numpy(), ((image[..., 2] - low) / (high - low)).clip(0, 1.5), rtol=1e-5)


def test_exposure_does_not_matter(rng: np.random.Generator) -> None:
    image = pixels(rng, 40, 30).astype(np.uint16)
    torch.testing.assert_close(normalise(image, 1), normalise(image * 200 + 77, 1), rtol=1e-4, atol=1e-4)


def test_a_large_image_is_scaled_by_a_sample_of_it(rng: np.random.Generator, monkeypatch) -> None:
    image = rng.gamma(2, 1000, (700, 900)).astype(np.uint16)
    exact = normalise(image, 1)
    monkeypatch.setattr("fastunet.images._SAMPLE", 50_000)
    sampled = normalise(image, 1)
    assert not torch.equal(sampled, exact)
    # The 99.8% quantile of 50,000 such numbers has a standard error of 1.25%; five of them.
    torch.testing.assert_close(sampled, exact, rtol=0.0625, atol=0.01)


@pytest.mark.parametrize("shape", [(23, 17), (24, 17, 3)], ids=str)
def test_row_bands_do_not_show(shape: tuple[int, ...], rng: np.random.Generator, monkeypatch) -> None:
    image, mask = pixels(rng, *shape), rng.random(shape[:2]) > 0.7
    flat = np.where(mask, image.max(), 7).astype(np.uint8) if image.ndim == 2 else image  # limits fall back
    flat[mask.cumsum().reshape(mask.shape) > 1] = 7
    whole = [normalise(image, 1), normalise(image, 3), normalise(flat, 1), torch.from_numpy(overlay(image, mask))]
    monkeypatch.setattr("fastunet.images._ROWS", 4)
    banded = [normalise(image, 1), normalise(image, 3), normalise(flat, 1), torch.from_numpy(overlay(image, mask))]
    for a, b in zip(whole, banded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_an_overlay_needs_little_more_memory_than_it_is_large(rng: np.random.Generator, monkeypatch) -> None:
    monkeypatch.setattr("fastunet.images._ROWS", 16)
    monkeypatch.setattr("fastunet.images._SAMPLE", 100_000)
    image, mask = pixels(rng, 1200, 1500), np.zeros((1200, 1500), np.uint8)
    tracemalloc.start()
    picture = overlay(image, mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.6 * picture.nbytes  # the image in float32 alone would be 4 times its size


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused(value: float) -> None:
    image = np.ones((4, 4))
    image[2, 1] = value
    with pytest.raises(ImageError, match="image: expected finite values, found NaN or infinity"):
        normalise(image, 1)


@pytest.mark.parametrize("shape", [(5,), (4, 4, 4), (4, 4, 1), (2, 4, 4, 3), (0, 4)], ids=str)
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=r"image: expected shape \(H, W\) or \(H, W, 3\), got "):
        normalise(np.ones(shape), 1)


def test_other_channels_are_refused() -> None:
    with pytest.raises(ImageError, match="channels: expected 1 or 3"):
        normalise(np.ones((4, 4)), 2)


# --- writing ---------------------------------------------------------------------------------


def test_overlay_tints_the_inside_draws_the_edge_and_keeps_the_rest(rng: np.random.Generator) -> None:
    image = pixels(rng, 20, 24)
    mask = np.zeros((20, 24), np.uint8)
    mask[5:12, 6:15] = 3
    plain, found = overlay(image, np.zeros_like(mask)), overlay(image, mask)
    assert found.shape == (20, 24, 3)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(plain[..., 0], plain[..., 2])
    outside = np.ones((20, 24), bool)
    outside[4:12, 5:15] = False
    np.testing.assert_array_equal(found[outside], plain[outside])
    assert (found[11, 6:15] == (255, 64, 64)).all()  # the last row inside
    inner = np.s_[6:11, 7:14]
    np.testing.assert_allclose(found[inner], 0.75 * plain[inner] + 0.25 * np.array([255, 64, 64]), atol=1)


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3)], ids=["grey", "rgb"])
def test_write_png_round_trip(rng: np.random.Generator, tmp_path: Path, shape: tuple[int, ...]) -> None:
    image = pixels(rng, *shape)
    write_png(tmp_path / "a.png", image)
    assert_reads(tmp_path / "a.png", image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "existing"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError, SystemExit])
def test_a_failed_write_leaves_no_trace(tmp_path: Path, old: bytes | None, stop: type[BaseException]) -> None:
    path = tmp_path / "a.bin"
    if old is not None:
        path.write_bytes(old)

    def write() -> None:
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"half")
            assert len(list(tmp_path.glob(".*"))) == 1
            raise stop

    with pytest.raises(stop):
        write()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if old is None else [old])


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path: Path) -> None:
    """Ctrl-C arrives as a signal, at any line of the block."""
    # A process started in the background inherits an ignored SIGINT, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def write() -> None:
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"new")
            signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            write()
    finally:
        signal.signal(signal.SIGINT, before)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
