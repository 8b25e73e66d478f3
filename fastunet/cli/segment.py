"""``fastunet segment``: masks and overlays of images."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import weights
from ..files import atomic_write
from ..images import SUFFIXES, ImageError, list_images, overlay, read_image, write_png
from ..predict import predict_mask
from ..reference import UNet
from .shared import DTYPES, SetupError, add_device_and_dtype, examples, new_console, new_progress, new_table


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser(
        "segment",
        help="write a mask and an overlay for each image",
        description=f"""\
Segment images of any size: PNG, JPEG or TIFF, 8 or 16 bit, grey or RGB.

Writes NAME_mask.png (0 and 255; the class index if the model has more than two classes) and
NAME_overlay.png for each image. NAME is the file's stem, with its extension or folder added
where several images share it. Of a folder, the {", ".join(SUFFIXES)} files in it are taken.

Exit code: 0 all fine, 1 some image failed (the others are done), 2 nothing could be started.""",
        **examples(
            "fastunet segment cells.png --out masks",
            "fastunet segment plate1/ plate2/ extra.tif --out masks --device cuda --dtype bf16",
            "fastunet segment cells.png --out masks --weights mine.safetensors",
        ),
    )
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if it is not there")
    command.add_argument(
        "--weights",
        type=Path,
        default=weights.NUCLEI,
        metavar="FILE",
        help="safetensors, .pt or .pth (default: the nuclei model that comes with FastUNet)",
    )
    add_device_and_dtype(command)
    command.set_defaults(run=segment)


@dataclass(frozen=True)
class Result:
    """One line of the table at the end of ``segment``."""

    image: Path
    outcome: str
    size: str = "-"
    foreground: str = "-"
    seconds: str = "-"
    failed: bool = False


def segment(arguments: argparse.Namespace) -> int:
    """Write a mask and an overlay for every image."""
    try:
        model = weights.load(arguments.weights, arguments.device, DTYPES[arguments.dtype])
    except (RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0] or "out of memory"
        raise SetupError(f"{arguments.weights}: cannot be put on {arguments.device} ({reason})") from None
    if model.config.in_channels not in (1, 3):
        channels = model.config.in_channels
        raise SetupError(f"{arguments.weights}: expected a model of 1 or 3 channels, got {channels}")
    # Pillow's limit guards servers against images that unpack to more than they expect. Here the
    # user named the files, and slides above the limit are what the tiles are for.
    Image.MAX_IMAGE_PIXELS = None
    out: Path = arguments.out
    _open_folder(out, arguments.images)

    errors = new_console(stderr=True)
    results: list[Result] = []

    def fail(path: Path, message: str) -> None:
        errors.print(f"fastunet: {path}: {message.removeprefix(f'{path}: ')}", soft_wrap=True)
        results.append(Result(path, "failed", failed=True))

    images = _gather(arguments.images, fail)
    inputs = {path.resolve() for path in images}
    with new_progress(errors) as progress:
        task = progress.add_task("", total=len(images))
        for path, name in zip(images, output_names(images), strict=True):
            progress.update(task, description=path.name)
            mask_path, overlay_path = out / f"{name}_mask.png", out / f"{name}_overlay.png"
            try:
                for target in (mask_path, overlay_path):
                    if target.resolve() in inputs:
                        raise ImageError(f"its output would overwrite the input {target}")
                results.append(_segment_one(model, path, mask_path, overlay_path))
            except (ValueError, OSError, MemoryError, RuntimeError) as error:
                # Unusable images (ImageError), a full disk, a device out of memory, a net too deep for tiles.
                fail(path, str(error).partition("\n")[0] or type(error).__name__)
            progress.advance(task)

    _print_results(results, out)
    return 1 if any(result.failed for result in results) else 0


def _open_folder(out: Path, sources: Sequence[Path]) -> None:
    """Make sure that ``out`` exists, can be written to and is none of the folders that are read."""
    for source in sources:
        if source.is_dir() and source.resolve() == out.resolve():
            # The next run would take the masks of this one for images.
            raise SetupError(f"--out: expected another folder than {source}, which is read")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # permission bits do not tell of a read-only disk
    except OSError as error:
        raise SetupError(f"--out: cannot write to {out} ({error.strerror})") from None


def _gather(sources: Sequence[Path], fail: Callable[[Path, str], None]) -> list[Path]:
    """The images to segment, each file once: those named, and those of folders by name."""
    images: dict[Path, Path] = {}
    for source in sources:
        found = [source]
        if source.is_dir():
            try:
                found = list_images(source)
            except ImageError as error:
                fail(source, str(error))
                continue
            except OSError as error:
                fail(source, f"cannot be listed ({error.strerror})")
                continue
        for path in found:
            images.setdefault(Path(os.path.abspath(path)), path)
    return list(images.values())


def output_names(paths: Sequence[Path]) -> list[str]:
    """One name per path, all distinct: the stem where that is enough.

    Images that share a stem are told apart by their extension (``cell_png`` and ``cell_tif``), else
    by their folder (``a_cell`` and ``b_cell``), else by both; a number settles what is left.
    """
    groups: defaultdict[str, list[Path]] = defaultdict(list)
    for path in paths:
        groups[path.stem.casefold()].append(path)  # some file systems ignore case
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for group in sorted(groups.values(), key=len):  # an unambiguous stem is never renamed
        labels: list[str] = []
        for template in ("{1}", "{1}_{2}", "{0}_{1}", "{0}_{1}_{2}"):
            labels = [template.format(path.absolute().parent.name, path.stem, path.suffix[1:]) for path in group]
            if len({label.casefold() for label in labels}) == len(group):
                break
        for path, label in zip(group, labels, strict=True):
            name, number = label, 1
            while name.casefold() in taken:
                number += 1
                name = f"{label}_{number}"
            taken.add(name.casefold())
            names[path] = name
    return [names[path] for path in paths]


def _segment_one(model: UNet, path: Path, mask_path: Path, overlay_path: Path) -> Result:
    start = time.perf_counter()
    image = read_image(path)
    mask = predict_mask(model, image)
    # To the eye 0 and 1 are both black; with more classes the file holds the class itself.
    visible = mask * np.uint8(255) if model.config.out_channels <= 2 else mask
    with atomic_write(mask_path) as mask_file, atomic_write(overlay_path) as overlay_file:  # both or none
        write_png(mask_file, visible)
        write_png(overlay_file, overlay(image, mask))
    return Result(
        image=path,
        outcome=mask_path.name,
        size=f"{image.shape[0]}x{image.shape[1]}",
        foreground=f"{(mask > 0).mean():.1%}",
        seconds=f"{time.perf_counter() - start:.2f}",
    )


def _print_results(results: Sequence[Result], out: Path) -> None:
    table = new_table("image", "size (HxW)", "foreground", "seconds", "outcome", numeric=("foreground", "seconds"))
    for result in results:
        table.add_row(str(result.image), result.size, result.foreground, result.seconds, result.outcome)
    console = new_console()
    console.print(table)
    done = sum(not result.failed for result in results)
    console.print(f"{done} of {len(results)} done, in {out}", soft_wrap=True)
