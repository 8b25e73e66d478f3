"""Image files in, normalised tensors out; masks and overlays back to files, never half-written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .files import atomic_write

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's "L"
_SAMPLE = 4_000_000  # values that estimate a percentile to well below one grey level
_ROWS = 256  # of an image that are held in floating point at a time


class ImageError(ValueError):
    """A file or array that cannot be used as an image; the message is one line and says which."""


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a PNG, JPEG or TIFF, told apart by their content.

    Returns:
        (H, W) or (H, W, 3) array of uint8 or uint16; TIFFs of other types become float32. Of several
        pages the first; upright, where a camera noted its orientation; alpha dropped, palettes and
        CMYK resolved to RGB. Pillow reads 16-bit RGB PNGs by their high byte.

    Raises:
        ImageError: missing file, not an image, corrupt, or not one grey or RGB plane.
    """
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"{path}: no such file")
    try:
        image = _read_tiff(path) if is_tiff(path) else _read_pillow(path)
    except (UnidentifiedImageError, tifffile.TiffFileError):
        raise ImageError(f"{path}: not an image, expected a PNG, JPEG or TIFF") from None
    except Exception as error:  # decoders raise many types on corrupt files; each is one line to the user
        reason = str(error).partition("\n")[0] or repr(error)
        raise ImageError(f"{path}: cannot be read ({reason})") from None
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or image.size == 0:
        raise ImageError(f"{path}: expected one grey or RGB plane, got an array of shape {image.shape}")
    return image


def is_tiff(path: Path) -> bool:
    """By the file's content: its byte order comes first."""
    with path.open("rb") as file:
        return file.read(2) in (b"II", b"MM")


def is_turned(page: tifffile.TiffPage | tifffile.TiffFrame) -> bool:
    """Whether the page is stored in another orientation than it is to be seen in."""
    tag = page.tags.get("Orientation") if isinstance(page, tifffile.TiffPage) else None
    return tag is not None and tag.value != 1


def _read_pillow(path: Path) -> np.ndarray:
    # Through a handle: given a path, Pillow 13 maps uncompressed TIFFs and scrambles turned ones.
    with path.open("rb") as handle, Image.open(handle, formats=("PNG", "JPEG", "TIFF")) as file:
        # The mask carries no orientation tag, so it must be upright itself to lie over the image.
        upright = ImageOps.exif_transpose(file)
        if upright.mode.startswith("I;16"):
            return np.asarray(upright, dtype=np.uint16)
        if upright.mode in ("I", "F"):
            return np.asarray(upright, dtype=np.float32)
        grey = upright.mode in ("1", "L", "LA", "La")
        return np.asarray(upright.convert("L" if grey else "RGB"))


def _read_tiff(path: Path) -> np.ndarray:
    """The first page; tifffile knows the integer and float types that Pillow does not."""
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        photometric = page.photometric
        plain = photometric in (
            tifffile.PHOTOMETRIC.MINISWHITE, tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB
        )  # fmt: skip
        if is_turned(page) or not plain:  # tifffile would give what is stored: palette indices, CMYK, YCbCr
            return _read_pillow(path)
        try:
            image = page.asarray()
        except ValueError:
            # LZW and JPEG compression need a codec package in tifffile; Pillow brings libtiff.
            return _read_pillow(path)
        if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and image.ndim == 3:
            image = np.moveaxis(image, 0, -1)
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    if photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        image = np.iinfo(image.dtype).max - image if image.dtype.kind == "u" else -image
    if image.ndim == 3:
        # One sample beyond the colours is alpha; more are a stack of channels, which is no image.
        colours = 3 if image.shape[2] == 3 or photometric == tifffile.PHOTOMETRIC.RGB else 1
        if image.shape[2] - colours in (0, 1):
            image = image[:, :, :colours] if colours == 3 else image[:, :, 0]
    if image.dtype in (np.uint8, np.uint16):
        return image
    if image.dtype.kind not in "uif":
        raise ValueError(f"expected real pixels, got {image.dtype}")
    return image.astype(np.float32)


def list_images(folder: Path) -> list[Path]:
    """The images in a folder, by name. Hidden files, such as macOS's ``._cell.png``, are not; a broken link is.

    Raises:
        OSError: it cannot be listed. ImageError: there are none.
    """
    shown = (path for path in folder.iterdir() if path.name[0] != "." and not path.is_dir())
    found = sorted(path for path in shown if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ImageError(f"{folder}: no images in this folder (expected {', '.join(SUFFIXES)})")
    return found


def limits(image: np.ndarray, channels: int) -> tuple[float, float]:
    """The grey levels that become 0 and 1: the 1st and the 99.8th percentile.

    Those of a very large image are the percentiles of an evenly spaced sample of some four million
    values. Where they are equal, more than 98.8% of the pixels are, and the whole range counts.

    Args:
        image: (H, W) or (H, W, 3), any real dtype.
        channels: 1 (colour becomes luma) or 3 (grey is repeated).

    Raises:
        ImageError: ``channels`` is neither, the shape is another, or the image holds NaN or infinity.
    """
    if channels not in (1, 3):
        raise ImageError(f"channels: expected 1 or 3, which is what an image has, got {channels}")
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or image.size == 0:
        raise ImageError(f"image: expected shape (H, W) or (H, W, 3), got {image.shape}")
    if not all(np.isfinite(rows).all() for _, rows in _row_bands(image)):
        raise ImageError("image: expected finite values, found NaN or infinity")
    values = image.shape[0] * image.shape[1] * (3 if image.ndim == 3 and channels == 3 else 1)
    step = max(1, round((values / _SAMPLE) ** 0.5))
    low, high = np.percentile(_planes(image[::step, ::step], channels), [1, 99.8])
    if high <= low:
        ranges = [(rows.min(), rows.max()) for rows in (_planes(rows, channels) for _, rows in _row_bands(image))]
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    return float(low), float(high)


def scale(image: np.ndarray, channels: int, limits: tuple[float, float]) -> Tensor:
    """An image, or rows of one, as float32 (channels, H, W): ``limits`` become 0 and 1.

    Values stop at 0 and 1.5; all are 0 where the limits are equal.
    """
    low, high = limits
    scaled = np.zeros((channels, *image.shape[:2]), dtype=np.float32)
    if high > low:
        for top, rows in _row_bands(image):
            planes = ((_planes(rows, channels).astype(np.float64) - low) / (high - low)).clip(0, 1.5)
            scaled[:, top : top + len(rows)] = planes
    return torch.from_numpy(scaled)


def normalise(image: np.ndarray, channels: int) -> Tensor:
    """Scale an image to about [0, 1] by its own :func:`limits`.

    Microscopes write 8, 12 and 16-bit images of any exposure, so a fixed full scale would leave
    many of them black. A constant image becomes zeros.

    Returns:
        float32 tensor (channels, H, W). Arguments and errors: :func:`limits`.
    """
    return scale(image, channels, limits(image, channels))


def _row_bands(image: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows): so many that floating-point copies of them are small beside the image."""
    for top in range(0, len(image), _ROWS):
        yield top, image[top : top + _ROWS]


def _planes(image: np.ndarray, channels: int) -> np.ndarray:
    """float32 (1 or 3, H, W); a single plane where grey is to be repeated."""
    x = image.astype(np.float32)
    if x.ndim == 2:
        return x[None]
    return (x @ _LUMA)[None] if channels == 1 else np.moveaxis(x, -1, 0)


def overlay(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = (255, 64, 64)) -> np.ndarray:
    """The image in grey or colour, the mask tinted and its outline drawn.

    Args:
        image: (H, W) or (H, W, 3), any real dtype.
        mask: (H, W); foreground is whatever is above 0.
        colour: RGB of tint and outline, each 0 to 255.

    Returns:
        (H, W, 3) uint8.
    """
    between = limits(image, 3)
    tint = np.array(colour, dtype=np.float32)
    picture = np.empty((*image.shape[:2], 3), dtype=np.uint8)
    for top, rows in _row_bands(image):
        pixels = scale(rows, 3, between).clamp_(0, 1).mul_(255).permute(1, 2, 0).numpy()
        inside = mask[top : top + _ROWS + 1] > 0  # with the row below, where the outline may run
        edge = np.zeros_like(inside)
        edge[:-1] |= inside[:-1] != inside[1:]
        edge[:, :-1] |= inside[:, :-1] != inside[:, 1:]
        inside, edge = inside[: len(rows)], edge[: len(rows)]
        pixels[inside] = 0.75 * pixels[inside] + 0.25 * tint
        pixels[edge] = tint
        picture[top : top + len(rows)] = pixels.round()
    return picture


def write_png(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) uint8 as a PNG; the file is whole or not there."""
    with atomic_write(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")
