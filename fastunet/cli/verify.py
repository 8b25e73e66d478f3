"""``fastunet verify``: proof that a fast model computes what its reference does."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import importlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import dispatch
from ..files import atomic_write
from ..parity import Report, verify
from ..parity.fuzz import Case, Fuzzed, fuzz
from ..parity.picture import draw
from ..parity.report import Check, Comparison
from ..parity.rule import tf32_convolutions
from ..reference import UNet
from .shared import (
    DTYPES,
    SetupError,
    a_config,
    a_count,
    a_seed,
    a_size,
    add_device_and_dtype,
    examples,
    new_console,
    new_progress,
)
from .verify_findings import Findings, case_command, command_of
from .verify_subject import call_factory, check_size, inputs_of, model_of, one_line


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser(
        "verify",
        help="check a model against plain PyTorch and float64",
        description="""\
Run a model as FastUNet, as plain PyTorch in the same dtype (the baseline) and as plain PyTorch in
float64 (the truth). Every layer, the output and every gradient of the first may be no farther from
the truth than the second, but for a stated floor of a few roundings; and it must repeat itself bit
by bit. With --fuzz or --all-configs that is done only if a model or images are named too.
With TRITON_INTERPRET=1 on a CPU, the kernels run in Triton's interpreter, slowly.

Exit code: 0 all holds, 1 something does not, 2 nothing could be started.""",
        **examples(
            "fastunet verify --weights mine.safetensors --images plate1/ --dtype bf16 --device cuda",
            "fastunet verify --config '{\"features\": [32, 64, 128]}' --size 100x75 --plot error.png",
            "fastunet verify --weights mine.pt --factory mylab.models:unet --json report.json",
            "fastunet verify --fuzz 500 --seed 1",
            "fastunet verify --all-configs --device cuda --dtype fp16",
        ),
    )
    what = command.add_mutually_exclusive_group()
    what.add_argument(
        "--weights", type=Path, metavar="FILE", help="safetensors, .pt or .pth (default: the shipped nuclei model)"
    )
    command.add_argument(
        "--config",
        type=a_config,
        metavar="JSON|FILE",
        help="a UNetConfig, as JSON or in a file: of weights without one, or of a network with weights from --seed",
    )
    what.add_argument("--case", type=_case, metavar="JSON", help="one case that --fuzz found, and nothing else")
    command.add_argument(
        "--factory",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="your reference: a function without arguments that returns an nn.Module. If its parameters have "
        "FastUNet's names it is given the model's weights, else it must come with them",
    )
    command.add_argument("--images", type=Path, metavar="FOLDER", help="inputs (default: random numbers from --seed)")
    command.add_argument(
        "--size",
        type=a_size,
        metavar="SIDE|HxW",
        help="in pixels; of images, the middle (default: 256, or what they have)",
    )
    command.add_argument("--batch", type=a_count, default=2, metavar="N", help="images at most (default: %(default)s)")
    command.add_argument(
        "--no-gradients",
        action="store_false",
        dest="gradients",
        help="of a reference whose ReLUs or max-pools are written in another way, where they cannot be compared",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON too")
    command.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG of the error over the image")
    command.add_argument(
        "--fuzz", type=a_count, metavar="N", help="check N random networks in all dtypes; a failure is made small"
    )
    command.add_argument("--seed", type=a_seed, default=0, metavar="S", help="of all random numbers (default: 0)")
    command.add_argument(
        "--all-configs", action="store_true", help="check every launch configuration that may be chosen for the model"
    )
    add_device_and_dtype(command, tf32=True)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check, print, write; interrupted, what is known so far."""
    _check_setup(arguments)
    console, found = new_console(), Findings()
    with _kernels(arguments.device), tf32_convolutions(arguments.dtype == "tf32"):
        try:
            if _names_a_model(arguments):
                _check_model(arguments, found)
                if found.report is not None:
                    console.print(str(found.report), soft_wrap=True)
            if arguments.all_configs:
                _check_configs(arguments, found)
            if arguments.fuzz is not None:
                _fuzz(arguments, found)
        except KeyboardInterrupt:
            found.interrupted = True
    if found.configs is not None or found.fuzzed is not None or found.failure or found.interrupted:
        console.print(found.summary(arguments), soft_wrap=True)
    if arguments.json is not None:
        with atomic_write(arguments.json) as temporary:
            temporary.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    if arguments.plot is not None and found.report is not None:
        with atomic_write(arguments.plot) as temporary:
            temporary.write_bytes(draw(found.report))
    if found.interrupted:
        return 130
    return 0 if found.ok else 1


def _check_setup(arguments: argparse.Namespace) -> None:
    """What can be known to fail is said before anything runs."""
    for option, package in (("plot", "matplotlib"), ("fuzz", "hypothesis")):
        if getattr(arguments, option) is not None and importlib.util.find_spec(package) is None:
            raise SetupError(f"--{option}: needs {package} (pip install 'fastunet[verify]')")
    for option in ("json", "plot"):
        path: Path | None = getattr(arguments, option)
        if path is not None:
            try:
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                if path.exists() and (not path.is_file() or path.suffix.lower() in (".safetensors", ".pt", ".pth")):
                    raise SetupError(f"--{option}: expected a file to write a report to, got {path}")
                tempfile.TemporaryFile(dir=path.parent).close()
            except OSError as error:
                raise SetupError(f"--{option}: cannot write {path} ({error.strerror})") from None
    if arguments.plot is not None and arguments.plot.suffix.lower() != ".png":
        raise SetupError(f"--plot: expected a file whose name ends in .png, got {arguments.plot}")
    if arguments.json is not None and arguments.plot is not None and arguments.json == arguments.plot:
        raise SetupError(f"--plot: expected another file than --json, got {arguments.plot}")
    if arguments.case is not None:
        others = ("config", "factory", "images", "size", "fuzz", "all_configs", "seed")
        given = next(
            (name for name in others if getattr(arguments, name)), None if arguments.gradients else "no-gradients"
        )
        if given is not None:
            raise SetupError(
                f"--{given.replace('_', '-')}: cannot be given with --case, which holds a network and inputs"
            )
    if arguments.dtype == "tf32" and arguments.device == "cpu":
        raise SetupError("--dtype: tf32 is of tensor cores, expected fp32, fp16 or bf16 on a CPU")
    if arguments.plot is not None and not _names_a_model(arguments):
        raise SetupError("--plot: shows a model's error, expected --weights, --images or another that names one")
    if arguments.all_configs:
        obstacle = dispatch.why_not_triton(torch.device(arguments.device), _dtype(arguments))
        if obstacle is not None:
            hint = "; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter" if arguments.device == "cpu" else ""
            raise SetupError(f"--all-configs: {obstacle}{hint}")


def _dtype(arguments: argparse.Namespace) -> torch.dtype:
    return torch.float32 if arguments.dtype == "tf32" else DTYPES[arguments.dtype]


@contextlib.contextmanager
def _kernels(device: str) -> Iterator[None]:
    """Interpreted kernels are too slow to be chosen by themselves; who sets TRITON_INTERPRET asks for them."""
    if device == "cpu" and dispatch.interpreting() and dispatch.has_triton():
        with dispatch.forced("triton"):
            yield
    else:
        yield


def _names_a_model(arguments: argparse.Namespace) -> bool:
    """Whether the model is to be checked: it or its inputs are named, or nothing else is asked for."""
    named = ["weights", "case", "factory", "images"]
    if not arguments.all_configs:  # which go by the configuration and the size themselves
        named += ["config", "size"]
    alone = arguments.fuzz is None and not arguments.all_configs
    return alone or any(getattr(arguments, name) is not None for name in named)


def _check_model(arguments: argparse.Namespace, found: Findings) -> None:
    """Fill in ``found.report``; until it is there, ``found.results``."""
    with new_progress(new_console(stderr=True)) as progress:
        task = progress.add_task("three networks", total=None)

        def on_result(result: Comparison | Check) -> None:
            found.results.append(result)
            progress.update(task, advance=1, description=result.name)

        if arguments.case is not None:
            try:
                report = arguments.case.check(arguments.device, on_result)
            except Exception as error:  # which may be what --fuzz found
                found.fuzzed = Fuzzed(0, arguments.case, error)
                return
            found.report = dataclasses.replace(report, command=case_command(arguments.case, arguments))
        else:
            try:
                found.report = _verify(arguments, on_result)
            except _Failed as error:
                if not found.results:
                    raise
                found.failure = str(error)  # in the middle: what is known stays known
                return
    found.results.clear()


class _Failed(SetupError):
    """The networks raised where nothing was wrong with what they were given."""


def _verify(arguments: argparse.Namespace, on_result: Callable[[Comparison | Check], None]) -> Report:
    model = model_of(arguments)
    reference: nn.Module = UNet.from_config(model.config)
    origin = "plain PyTorch"
    if arguments.factory is not None:
        reference = call_factory(arguments.factory)
        origin = f"{arguments.factory}, with its own weights"
    ours, theirs = model.state_dict(), reference.state_dict()
    if arguments.factory is None or ours.keys() == theirs.keys():
        try:
            reference.load_state_dict(ours)
        except RuntimeError as error:  # shapes
            raise SetupError(f"--factory: {str(error).splitlines()[-1].strip()}") from None
        origin = origin.replace("its own weights", "the model's weights, as its parameters have their names")
    reference = reference.to(arguments.device).eval()
    x, shown = inputs_of(arguments, model.config)
    try:
        report = verify(
            model.to(arguments.device),
            reference,
            x.to(arguments.device),
            dtype=_dtype(arguments),
            gradients=arguments.gradients,
            on_result=on_result,
        )
    except ValueError as error:
        raise SetupError(str(error).replace("gradients=False", "--no-gradients")) from None
    except (Exception, SystemExit) as error:  # the user's module, or memory
        raise _Failed(f"the networks could not be run ({one_line(error)})") from None
    shipped = "the shipped nuclei model" if arguments.config is None else f"random, seed {arguments.seed}"
    about = (*report.about, f"weights: {arguments.weights or shipped}", f"reference: {origin}", f"inputs: {shown}")
    return dataclasses.replace(report, about=about, command=command_of(arguments))


def _check_configs(arguments: argparse.Namespace, found: Findings) -> None:
    from ..parity.configs import check_configs  # needs Triton

    config = model_of(arguments).config
    height, width = arguments.size or (256, 256)
    check_size(height, width, config)
    found.configs = []
    with new_progress(new_console(stderr=True)) as progress:
        task = progress.add_task("launch configurations", total=None)
        size, dtype = (arguments.batch, height, width), _dtype(arguments)
        for comparison in check_configs(config, size, arguments.device, dtype, arguments.seed):
            found.configs.append(comparison)
            progress.update(task, advance=1, description=comparison.name)


def _fuzz(arguments: argparse.Namespace, found: Findings) -> None:
    found.fuzzed = Fuzzed(0)
    with new_progress(new_console(stderr=True)) as progress:
        task = progress.add_task("random networks", total=arguments.fuzz)

        def on_progress(so_far: Fuzzed) -> None:
            found.fuzzed = so_far  # what is known if it is interrupted
            doing = "random networks" if so_far.case is None else "making a failure small"
            progress.update(task, completed=so_far.passed, description=doing)

        found.fuzzed = fuzz(arguments.fuzz, arguments.seed, arguments.device, on_progress)


def _case(text: str) -> Case:
    try:
        return Case.from_json(text)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"expected a case as --fuzz prints it ({error})") from None
