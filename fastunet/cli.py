"""The ``fastunet`` command.

Exit codes: 0 all fine, 1 some image failed, 2 wrong usage or a setup that cannot work (weights,
device, output folder), 130 interrupted. Errors are one line each, on stderr.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import dispatch, weights
from .config import UPSAMPLE, UNetConfig
from .explain import COLUMNS, NUMERIC, explain_config
from .files import atomic_write
from .images import SUFFIXES, ImageError, overlay, read_image, write_png
from .predict import predict_mask
from .reference import UNet

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

TUTORIAL_NOTE = """\
The tutorial walks from 256x256 to a bottleneck of 512 channels at 32x32. That is three poolings
of size and four of channels; with four the bottleneck is 16x16. Its code upsamples bilinearly and
so keeps 1024 channels (1024 + 512 = 1536 at the first concatenation); its text says 512 + 512,
which is --upsample bilinear_conv or transpose."""


class SetupError(Exception):
    """What was asked for cannot be started; the message is one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``argv`` defaults to the process's arguments."""
    # A plain kill takes Ctrl-C's way out, on which a half-written file is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (SetupError, weights.WeightsError) as error:
        _console(stderr=True).print(f"fastunet: {error}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        _console(stderr=True).print("fastunet: interrupted", soft_wrap=True)
        return 130


# --- segment ---------------------------------------------------------------------------------


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

    errors = _console(stderr=True)
    results: list[Result] = []

    def fail(path: Path, message: str) -> None:
        errors.print(f"fastunet: {path}: {message.removeprefix(f'{path}: ')}", soft_wrap=True)
        results.append(Result(path, "failed", failed=True))

    images = _gather(arguments.images, fail)
    inputs = {path.resolve() for path in images}
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as progress:
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
                # Hidden files, such as macOS's ``._cell.png``, are not images.
                found = sorted(
                    path
                    for path in source.iterdir()
                    if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()
                )
            except OSError as error:
                fail(source, f"cannot be listed ({error.strerror})")
                continue
            if not found:
                fail(source, f"no images in this folder (expected {', '.join(SUFFIXES)})")
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
    table = _table("image", "size (HxW)", "foreground", "seconds", "outcome", numeric=("foreground", "seconds"))
    for result in results:
        table.add_row(str(result.image), result.size, result.foreground, result.seconds, result.outcome)
    console = _console()
    console.print(table)
    done = sum(not result.failed for result in results)
    console.print(f"{done} of {len(results)} done, in {out}", soft_wrap=True)


# --- summary ---------------------------------------------------------------------------------


def summary(arguments: argparse.Namespace) -> int:
    """Print the data flow of a network, from its description alone."""
    config = UNetConfig(upsample=arguments.upsample)
    if arguments.weights is not None:
        found = weights.read(arguments.weights)[0]
        if found is None:
            raise SetupError(f"{arguments.weights}: holds no configuration (fastunet.weights.save writes one)")
        config = found
    height, width = arguments.size
    if min(height, width) < config.minimum_size:
        least = config.minimum_size
        raise SetupError(f"--size: expected at least {least}x{least} for this network, got {height}x{width}")
    size = (arguments.batch, config.in_channels, height, width)
    explanation = explain_config(config, size, torch.device(arguments.device), DTYPES[arguments.dtype])

    table = _table(*COLUMNS[:-1], numeric=NUMERIC)
    for row in explanation.rows:
        table.add_row(*row.cells()[:-1])
    console = _console()
    console.print(table)
    console.print(explanation.headline(), soft_wrap=True)
    for choice in dict.fromkeys(row.choice for row in explanation.rows):
        console.print(f"{choice.implementation}: {choice.reason}", soft_wrap=True)
    if arguments.weights is None:
        console.print(f"\n{TUTORIAL_NOTE}", soft_wrap=True)
    return 0


# --- info ------------------------------------------------------------------------------------


def info(arguments: argparse.Namespace) -> int:
    """Print versions, devices and where the kernels can run."""
    console = _console()
    table = _table("what", "version")
    for name in ("fastunet", "torch", "triton"):
        table.add_row(name, _version(name))
    table.add_row("python", platform.python_version())
    table.add_row("CUDA", torch.version.cuda or "none: this PyTorch is built without it")
    table.add_row("cuDNN", str(torch.backends.cudnn.version() or "none"))
    console.print(table)

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    table = _table("device", "name", "capability", "memory", "SMs")
    for device in devices:
        if device.type == "cpu":
            table.add_row("cpu", platform.processor() or platform.machine(), "-", "-", "-")
            continue
        found = torch.cuda.get_device_properties(device)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        table.add_row(str(device), found.name, f"{found.major}.{found.minor}", memory, str(found.multi_processor_count))
    console.print(table)

    table = _table("device", "dtype", "Triton kernels")
    for device in devices:
        for name, dtype in DTYPES.items():
            obstacle = dispatch.why_not_triton(device, dtype)
            table.add_row(str(device), name, "usable" if obstacle is None else f"not usable: {obstacle}")
    console.print(table)
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# --- what the commands share -----------------------------------------------------------------


def _console(*, stderr: bool = False) -> Console:
    # File names may hold [brackets] and :colons:. Off a terminal nothing is gained by folding at 80.
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 200
    return console


def _table(*headings: str, numeric: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in numeric else "left", overflow="fold")
    return table


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if text != "cpu":
        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError(f"expected cpu, as CUDA is not available here, got {text!r}")
        if (torch.device(text).index or 0) >= torch.cuda.device_count():
            raise argparse.ArgumentTypeError(
                f"expected one of {torch.cuda.device_count()} CUDA devices, counted from 0, got {text!r}"
            )
    return text


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a side or HEIGHTxWIDTH in pixels, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _count(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


class _Parser(argparse.ArgumentParser):
    """Wrong usage is one line, like every other error; --help is the place for the rest."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    def examples(*lines: str) -> dict[str, Any]:
        epilog = "\n".join(("Examples:", *(f"  {line}" for line in lines)))
        return {"epilog": epilog, "formatter_class": argparse.RawDescriptionHelpFormatter}

    def add_device_and_dtype(command: argparse.ArgumentParser) -> None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        command.add_argument(
            "--device", type=_device, default=default, help="cpu, cuda or cuda:N (default here: %(default)s)"
        )
        command.add_argument("--dtype", choices=DTYPES, default="fp32", help="default: %(default)s")

    parser = _Parser(
        prog="fastunet",
        description="U-Net segmentation with fused Triton kernels.",
        **examples(
            "fastunet segment cells.png --out masks",
            "fastunet summary --size 256",
            "fastunet info",
        ),
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

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

    command = commands.add_parser(
        "summary",
        help="show a network's data flow, layer by layer",
        description="""\
Show the data flow of a network: every fused operator with its shapes, parameters, work and the
implementation that serves it. Nothing is computed. The default is the tutorial's network: one
channel in, two out, features 64 to 1024.""",
        **examples(
            "fastunet summary --size 256",
            "fastunet summary --size 480x640 --batch 8 --upsample transpose",
            "fastunet summary --size 512 --weights mine.safetensors --dtype fp16",
        ),
    )
    command.add_argument("--size", type=_size, default=(256, 256), metavar="SIDE|HxW", help="in pixels (default: 256)")
    command.add_argument("--batch", type=_count, default=1, metavar="N", help="default: %(default)s")
    network = command.add_mutually_exclusive_group()
    network.add_argument("--upsample", choices=UPSAMPLE, default="bilinear", help="default: %(default)s")
    network.add_argument("--weights", type=Path, metavar="FILE", help="show the network of this file")
    add_device_and_dtype(command)
    command.set_defaults(run=summary)

    command = commands.add_parser(
        "info",
        help="show versions, devices and where the kernels can run",
        description="Show versions and devices, and for each device and dtype whether the kernels can run.",
        **examples("fastunet info"),
    )
    command.set_defaults(run=info)
    return parser
