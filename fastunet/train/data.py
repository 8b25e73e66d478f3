"""Folders of images and masks: found, paired, split, and every file checked before training starts."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError

from ..images import SUFFIXES, ImageError, is_tiff, is_turned, limits, list_images, read_image

MASKS = ("labels", "masks")  # names of the folder beside images/
MEMORY = 4 * 2**30  # bytes of pixels that are kept after checking; the files of larger sets are read again


class DataError(ValueError):
    """Data that cannot be trained on; ``problems`` holds a line for each file or folder, with its name."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass
class Pair:
    """An image and its mask."""

    image_path: Path
    mask_path: Path
    shape: tuple[int, int]  # (H, W)
    limits: tuple[float, float]  # grey levels that become 0 and 1
    hashes: tuple[str, str]  # of the image's pixels and the mask's classes
    kept: tuple[np.ndarray, np.ndarray] | None = None

    def read(self, classes: int) -> tuple[np.ndarray, np.ndarray]:
        """(image as :func:`fastunet.images.read_image` gives it, (H, W) uint8 class of each pixel)."""
        return self.kept or (read_image(self.image_path), read_mask(self.mask_path, classes))


@dataclass(frozen=True)
class Data:
    """What a network is trained and validated on. ``classes`` is its number of output channels."""

    train: list[Pair]
    val: list[Pair]
    channels: int
    classes: int

    def fingerprint(self) -> str:
        """Names, pixels and exposure of all images, and their masks, as a short hash: the same wherever they lie."""
        sets = self.train, self.val
        parts = [[(p.image_path.name, p.shape, p.limits, p.hashes) for p in pairs] for pairs in sets]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def find(folder: str | os.PathLike[str], channels: int, classes: int, val_fraction: float = 0.2) -> Data:
    """Find and check the images of ``folder``, every file of them.

    Two layouts: ``train/`` and ``val/`` with ``images/`` and ``labels/`` (or ``masks/``) in each; or
    ``images/`` and ``masks/`` (or ``labels/``) alone, of which ``val_fraction`` validates: the images
    whose names have the smallest hashes, so that the choice is the same everywhere and all but stays
    when images are added. The mask of ``cell.jpg`` is ``cell.png`` or ``cell_mask.png``, or a TIFF.

    Args:
        channels: of the network's input, 1 (colour becomes luma) or 3 (grey is repeated).
        classes: output channels. Up to two: whatever is above 0 in a mask is foreground, so that
            instance numbers and 255 will do. More: a mask's values are classes, from 0.

    Raises:
        DataError: anything wrong with any file, all in one go: an image that cannot be read or holds
            NaN, a mask of another size or in a JPEG, an image without mask, a mask without image, an empty set.
    """
    folder, problems = Path(folder), []
    if not folder.is_dir():
        raise DataError([f"{folder}: no such folder"])
    split = [folder / "train", folder / "val"]
    if any((part / "images").is_dir() for part in split):
        sets = [_checked(part, channels, classes, problems) for part in split]
    elif not (folder / "images").is_dir():
        layout = "images/ and masks/ (or labels/) in it, or in each of train/ and val/"
        raise DataError([f"{folder}: expected {layout}"])
    else:
        pairs = _checked(folder, channels, classes, problems)
        by_hash = sorted(pairs, key=lambda pair: hashlib.sha256(pair.image_path.stem.encode()).digest())
        chosen = {id(pair) for pair in by_hash[: math.ceil(val_fraction * len(pairs))]}
        sets = [[p for p in pairs if id(p) not in chosen], [p for p in pairs if id(p) in chosen]]
        if not problems and not (sets[0] and sets[1]):
            problems.append(f"{folder}: {len(pairs)} images, too few to split into training and validation")
    if problems:
        raise DataError(problems)
    return Data(sets[0], sets[1], channels, classes)


def read_mask(path: Path, classes: int) -> np.ndarray:
    """(H, W) uint8 class of each pixel; for up to two classes, 1 wherever the file is above 0.

    Raises:
        ImageError: not an image, a JPEG, in colour, or a class that the network does not have.
    """
    if not path.is_file():
        raise ImageError(f"{path}: no such file")
    try:
        mask = _stored(path)
    except ImageError:
        raise
    except (UnidentifiedImageError, tifffile.TiffFileError):
        raise ImageError(f"{path}: not an image, expected a PNG or TIFF") from None
    except Exception as error:  # decoders raise many types on corrupt files
        raise ImageError(f"{path}: cannot be read ({str(error).partition(chr(10))[0] or repr(error)})") from None
    if mask.ndim == 3 and mask.shape[2] in (3, 4) and (mask[..., 1:3] == mask[..., :1]).all():
        mask = mask[..., 0]  # grey, stored as colour
    if mask.ndim != 2 or mask.size == 0:
        raise ImageError(f"{path}: expected a mask of one plane, got an array of shape {mask.shape}")
    if classes <= 2:
        return (mask > 0).astype(np.uint8)
    if mask.dtype.kind not in "uib" or mask.min() < 0 or mask.max() >= classes:
        raise ImageError(f"{path}: expected classes 0 to {classes - 1}, got {mask.min()} to {mask.max()}")
    return mask.astype(np.uint8)


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def _stored(path: Path) -> np.ndarray:
    """The values of a mask as they are stored, but upright, as its image is: a palette's indices are the classes."""
    jpeg = f"{path}: a JPEG, whose compression changes classes; expected a mask in a PNG or TIFF"
    if is_tiff(path):
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            if page.compression in (tifffile.COMPRESSION.OJPEG, tifffile.COMPRESSION.JPEG):
                raise ImageError(jpeg)
            if not is_turned(page):
                # LZW needs a codec package in tifffile; Pillow, which does not know every integer, brings libtiff.
                with contextlib.suppress(ValueError):
                    return file.asarray()
    with path.open("rb") as handle, Image.open(handle) as file:  # through a handle: as read_image does
        if file.format in ("JPEG", "MPO"):
            raise ImageError(jpeg)
        if (pages := getattr(file, "n_frames", 1)) > 1:
            raise ImageError(f"{path}: expected a mask of one plane, got {pages} pages")
        return np.asarray(ImageOps.exif_transpose(file))


def _checked(folder: Path, channels: int, classes: int, problems: list[str]) -> list[Pair]:
    """The usable pairs of ``folder``; a line for each other file is added to ``problems``."""
    matched = _matched(folder, problems)

    def check(paths: tuple[Path, Path]) -> Pair | str:
        try:
            image, mask = read_image(paths[0]), read_mask(paths[1], classes)
            if image.shape[:2] != mask.shape:
                sizes = "expected the {}x{} pixels of its image, got {}x{}".format(*image.shape[:2], *mask.shape)
                return f"{paths[1]}: {sizes}"
            try:
                between = limits(image, channels)
            except ImageError as error:
                return f"{paths[0]}: {str(error).removeprefix('image: ')}"
        except ImageError as error:
            return str(error)
        hashes = _hash(image), _hash(mask)
        return Pair(*paths, mask.shape, between, hashes, (image, mask))

    pairs, size = [], 0
    with ThreadPoolExecutor() as pool:
        for result in pool.map(check, matched):
            if isinstance(result, str):
                problems.append(result)
                continue
            assert result.kept is not None
            size += sum(array.nbytes for array in result.kept)
            if size > MEMORY:
                result.kept = None
            pairs.append(result)
    if pairs and not any((pair.read(classes)[1] > 0).any() for pair in pairs):
        problems.append(f"{folder}: no mask has any foreground")
    return pairs


def _of_other_formats(folder: Path) -> list[Path]:
    """Images that Pillow would know and we do not read; hidden files and notes beside the images are none."""
    others = Image.registered_extensions().keys() - SUFFIXES
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in others and path.name[0] != ".")


def _matched(folder: Path, problems: list[str]) -> list[tuple[Path, Path]]:
    """(image, mask) paths of ``folder``, by stem; a line for each without the other is added to ``problems``."""
    beside = [folder / name for name in MASKS if (folder / name).is_dir()]
    if len(beside) != 1 and (folder / "images").is_dir():
        names = " or ".join(f"{name}/" for name in MASKS)
        problems.append(f"{folder}: expected {names} beside images/, got {'both' if beside else 'neither'}")
        return []
    mask_folder = beside[0] if beside else folder / MASKS[0]
    found: list[dict[str, Path]] = []
    for part in (folder / "images", mask_folder):
        found.append({})
        try:
            for path in list_images(part):
                if path.stem in found[-1]:
                    problems.append(f"{path}: has the same name as {found[-1][path.stem].name}")
                found[-1].setdefault(path.stem, path)
            problems += [f"{path}: expected a PNG, JPEG or TIFF" for path in _of_other_formats(part)]
        except ImageError as error:
            problems.append(str(error))
        except OSError as error:
            what = "no such folder" if isinstance(error, FileNotFoundError) else f"cannot be listed ({error.strerror})"
            problems.append(f"{part}: {what}")
    images, masks = found
    if not images or not masks:
        return []  # said once, not for each file
    names = {stem: next((n for n in (stem, f"{stem}_mask") if n in masks), None) for stem in images}
    for stem, name in names.items():
        if name is None:
            problems.append(f"{images[stem]}: has no mask in {mask_folder}")
    for stem in masks.keys() - set(names.values()):
        problems.append(f"{masks[stem]}: has no image in {folder / 'images'}")
    return [(images[stem], masks[name]) for stem, name in names.items() if name is not None]
