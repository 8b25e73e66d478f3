"""``fastunet convert``: other projects' weights into FastUNet's file, and back."""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import weights
from ..checkpoint import write
from ..convert import FAMILIES, convert, export
from ..files import atomic_write
from ..model import FastUNet
from ..parity import verify
from ..reference import UNet
from .shared import SetupError, examples, new_console

_SIDE = 64  # pixels of the parity check's input, or what the network needs


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser(
        "convert",
        help="take another project's weights, or give them back",
        description=f"""\
Read the weights of a U-Net, say what was recognised, and write them with FastUNet's keys and
configuration, as safetensors; or, with --to, with the keys of another project. Known are
{", ".join(FAMILIES)}, and FastUNet's own files.

At the end the file is read again, must give back the weights to the bit, and must hold to the
rule of fastunet verify on random inputs.

Exit code: 0 written and checked, 1 written and a check broke, 2 nothing written.""",
        **examples(
            "fastunet convert unet_carvana.pth --out carvana.safetensors",
            "fastunet convert carvana.safetensors --to milesial --out back.pth",
            "fastunet convert vanvugt.pth --set padding=same --out unet.safetensors",
        ),
    )
    command.add_argument("weights", type=Path, metavar="IN", help="safetensors, .pt or .pth")
    command.add_argument(
        "--out", type=Path, required=True, metavar="OUT", help="a .safetensors file; with --to also .pt or .pth"
    )
    command.add_argument("--to", choices=FAMILIES, help="write the keys of this project")
    command.add_argument(
        "--set",
        action="append",
        type=_option,
        default=[],
        dest="told",
        metavar="NAME=VALUE",
        help="an option of UNetConfig that keys do not tell, in place of the project's default; may be repeated",
    )
    command.add_argument("--no-verify", action="store_false", dest="verify", help="leave the checks at the end out")
    command.set_defaults(run=run)


def _option(text: str) -> tuple[str, Any]:
    """``"padding=same"`` is ("padding", "same"); numbers, true, false and null are read as JSON has them."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def run(arguments: argparse.Namespace) -> int:
    """Convert, write, check."""
    out: Path = arguments.out
    _check_out(out, arguments)
    console = new_console()
    logging.getLogger("fastunet.convert").addHandler(logging.NullHandler())  # what it says is printed below
    model = convert(arguments.weights, **dict(arguments.told))
    origin = "a FastUNet" if model.origin is None else str(model.origin)
    console.print(f"{arguments.weights}: {origin}", soft_wrap=True)
    console.print(str(model.config), soft_wrap=True)
    if arguments.to is None:
        _to_out(out, lambda: weights.save(model, out))
    else:
        try:
            state = export(model, arguments.to)
        except ValueError as error:
            raise SetupError(f"--to: {error}") from None
        _to_out(out, lambda: _write(out, state))
        left = [key for key, value in state.items() if not isinstance(value, Tensor)]
        if out.suffix == ".safetensors" and left:
            console.print(f"left out, as safetensors holds tensors alone (.pth does not): {', '.join(left)}")
    console.print(f"written: {out}", soft_wrap=True)
    return 0 if not arguments.verify or _check(model, out, console) else 1


def _check_out(out: Path, arguments: argparse.Namespace) -> None:
    """What can be known to fail is said before anything is read."""
    suffixes = (".safetensors",) if arguments.to is None else (".safetensors", ".pt", ".pth")
    if out.suffix not in suffixes:
        raise SetupError(f"--out: expected a name that ends in {' or '.join(suffixes)}, got {out}")
    if out.resolve() == arguments.weights.resolve():
        raise SetupError(f"--out: expected another file than {out}, which is read")
    try:
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise SetupError(f"--out: cannot write {out} ({error.strerror})") from None


def _to_out(out: Path, save: Any) -> None:
    try:
        save()
    except OSError as error:
        raise SetupError(f"--out: cannot write {out} ({error.strerror})") from None


def _write(out: Path, state: dict[str, Any]) -> None:
    if out.suffix == ".safetensors":
        # Copies, as safetensors refuses tensors that share memory, which some networks have under two names.
        write(out, {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}, {})
    else:
        with atomic_write(out) as temporary:
            torch.save(state, temporary)


def _check(model: FastUNet, out: Path, console: Any) -> bool:
    """The file once more: the same weights to the bit, and parity with plain PyTorch."""
    found = convert(out)
    ours, theirs = model.state_dict(), found.state_dict()
    differ = next((key for key in ours if not _same_bits(ours[key], theirs[key])), None)
    console.print("weights of the file: " + ("bitwise equal" if differ is None else f"NOT equal, first {differ}"))
    config = model.config  # the file's own, or what its keys do not tell, as it was before
    reference = UNet.from_config(config)
    reference.load_state_dict(theirs)
    model.load_state_dict(theirs)
    step = config.reduction
    side = -(-max(_SIDE, config.minimum_size, 2 * step) // step) * step
    x = torch.randn(1, config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    try:
        report = verify(model.eval(), reference.eval(), x, dtype=torch.float32)
    except ValueError as error:  # weights of NaN, say: written as they are, and nothing can be said of them
        console.print(f"NOT checked: {error}", soft_wrap=True)
        return False
    output = next(c for c in report.comparisons if c.kind == "output")
    if report.ok:
        counts = {kind: sum(c.kind == kind for c in report.comparisons) for kind in ("layer", "gradient")}
        console.print(
            f"parity: output off by {output.candidate.max:.1e}, plain PyTorch by {output.baseline.max:.1e}; "
            f"{counts['layer']} layers and {counts['gradient']} gradients hold too",
            soft_wrap=True,
        )
    else:
        console.print(str(report), soft_wrap=True)
    return report.ok and differ is None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    bits = (t.reshape(-1).view(torch.uint8) for t in (a, b))  # NaN is no equal of itself
    return a.dtype == b.dtype and torch.equal(*bits)
