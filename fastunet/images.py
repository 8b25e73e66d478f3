"""Image files in, normalised tensors out; masks and overlays back to files, never half-written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's "L"


class ImageError(ValueError):
    """A file that cannot be used as an image; the message is one line and names the file."""


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a PNG, JPEG or TIFF.

    Returns:
        (H, W) or (H, W, 3) array of uint8 or uint16; float TIFFs stay float32. Alpha is dropped,
        palettes are resolved. Pillow reads 16-bit RGB PNGs by their high byte.

    Raises:
        ImageError: missing file, not an image, corrupt, or not one 2-D plane.
    """
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"{path}: no such file")
    try:
        image = _read_tiff(path) if path.suffix.lower() in (".tif", ".tiff") else _read_pillow(path)
    except UnidentifiedImageError:
        raise ImageError(f"{path}: not an image (expected {', '.join(SUFFIXES)})") from None
    except Exception as error:  # decoders raise many types on corrupt files; each is one line to the user
        raise ImageError(f"{path}: cannot be decoded ({str(error).splitlines()[0] if str(error) else error!r})") from None
    if image.ndim == 3 and image.shape[2] in (2, 4):
        image = image[:, :, : image.shape[2] - 1]
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or image.size == 0:
        raise ImageError(f"{path}: expected one grey or RGB plane, got an array of shape {image.shape}")
    return image


def _read_pillow(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        if file.mode.startswith("I;16"):
            return np.asarray(file, dtype=np.uint16)
        if file.mode == "I":
            return np.asarray(file).clip(0, 65535).astype(np.uint16)
        grey = file.mode in ("1", "L", "LA")
        return np.asarray(file.convert("L" if grey else "RGB"))


def _read_tiff(path: Path) -> np.ndarray:
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            image = page.asarray()
            if getattr(page, "planarconfig", 1) == 2 and image.ndim == 3:
                image = np.moveaxis(image, 0, -1)
    except tifffile.TiffFileError:
        raise UnidentifiedImageError from None
    except ValueError:
        # LZW and JPEG compression need a codec package in tifffile; Pillow brings libtiff.
        return _read_pillow(path)
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    return image.astype(np.float32) if image.dtype not in (np.uint8, np.uint16) else image


def normalise(image: np.ndarray, channels: int) -> Tensor:
    """Scale an image to about [0, 1] by its own 1st and 99.8th percentile.

    Microscopes write 8, 12 and 16-bit images of any exposure, so a fixed full scale would leave
    many of them black. A constant image becomes zeros.

    Args:
        image: (H, W) or (H, W, 3), any real dtype.
        channels: 1 (colour becomes luma) or 3 (grey is repeated).

    Returns:
        float32 tensor (channels, H, W).

    Raises:
        ImageError: ``channels`` is neither, or the image holds NaN or infinity.
    """
    if channels not in (1, 3):
        raise ImageError(f"channels: an image gives 1 or 3, the model wants {channels}")
    x = image.astype(np.float32)
    if not np.isfinite(x).all():
        raise ImageError("image: expected finite values, found NaN or infinity")
    if x.ndim == 3 and channels == 1:
        x = x @ _LUMA
    low, high = np.percentile(x, [1, 99.8])
    if high <= low:  # more than 98.8% of the pixels equal: fall back on the whole range
        low, high = float(x.min()), float(x.max())
    x = (x - low) / (high - low) if high > low else np.zeros_like(x)
    if x.ndim == 2:
        x = np.broadcast_to(x, (channels, *x.shape))
    else:
        x = np.moveaxis(x, -1, 0)
    return torch.from_numpy(np.ascontiguousarray(x.clip(0, 1.5), dtype=np.float32))


def overlay(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = (255, 64, 64)) -> np.ndarray:
    """The image in grey or colour, the mask tinted and its outline drawn. Returns (H, W, 3) uint8."""
    grey = normalise(image, 3).clamp(0, 1).permute(1, 2, 0).numpy() * 255
    inside = mask > 0
    edge = np.zeros_like(inside)
    edge[:-1] |= inside[:-1] != inside[1:]
    edge[:, :-1] |= inside[:, :-1] != inside[:, 1:]
    tint = np.array(colour, dtype=np.float32)
    grey[inside] = 0.75 * grey[inside] + 0.25 * tint
    grey[edge] = tint
    return grey.round().astype(np.uint8)


def write_png(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write an 8-bit PNG under a temporary name, then rename: the file is whole or not there."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            Image.fromarray(array).save(file, format="PNG")
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp gives 0600
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
