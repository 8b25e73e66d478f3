"""What the commands share: errors, tables, and the types of their arguments."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..config import UNetConfig

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class SetupError(Exception):
    """What was asked for cannot be started; the message is one line."""


def new_console(*, stderr: bool = False) -> Console:
    # File names may hold [brackets] and :colons:. Off a terminal nothing is gained by folding at 80.
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 200
    return console


def new_table(*headings: str, numeric: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in numeric else "left", overflow="fold")
    return table


def new_progress(console: Console) -> Progress:
    """A bar on a terminal, nothing elsewhere."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def a_device(text: str) -> str:
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


def a_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a side or HEIGHTxWIDTH in pixels, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def a_count(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def a_seed(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer in [0, 2**63), got {text!r}")
    return int(text)


def a_config(text: str) -> UNetConfig:
    try:
        if not text.lstrip().startswith("{"):
            text = Path(text).read_text(encoding="utf-8")
        return UNetConfig.from_json(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"expected a UNetConfig as JSON or a file with one, got {text!r} ({error.strerror})"
        ) from None
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"expected a UNetConfig as JSON or a file with one ({error})") from None


class Parser(argparse.ArgumentParser):
    """Wrong usage is one line, like every other error; --help is the place for the rest."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def examples(*lines: str) -> dict[str, Any]:
    """Arguments of a parser that ends its help with these command lines."""
    epilog = "\n".join(("Examples:", *(f"  {line}" for line in lines)))
    return {"epilog": epilog, "formatter_class": argparse.RawDescriptionHelpFormatter}


def add_device_and_dtype(command: argparse.ArgumentParser, *, tf32: bool = False) -> None:
    """The options --device and --dtype, the latter with ``"tf32"`` if that is told from fp32."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument(
        "--device", type=a_device, default=default, help="cpu, cuda or cuda:N (default here: %(default)s)"
    )
    choices = [*DTYPES, "tf32"] if tf32 else [*DTYPES]
    command.add_argument("--dtype", choices=choices, default="fp32", help="default: %(default)s")
