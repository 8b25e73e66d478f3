"""``fastunet train``: weights from a folder of images and masks."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import weights
from ..config import UNetConfig
from ..images import ImageError
from ..model import FastUNet
from ..train import DataError, DivergedError, Point, Processes, Settings, TrainingError, find, fit, processes
from ..train.checkpoint import STATE
from .shared import (
    SetupError,
    a_config,
    a_count,
    a_seed,
    add_device_and_dtype,
    examples,
    new_console,
    new_progress,
)

DEFAULTS = Settings()
SHOWN_EVERY = 10  # steps; reading a loss waits for the device


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser(
        "train",
        help="train a network on images and masks",
        description="""\
Train on DATA/train and DATA/val, each with images/ and labels/ (or masks/), or on DATA/images and
DATA/masks alone, of which a part validates. Images may differ in size, format and exposure. A mask has its image's
name, with or without _mask; with one or two classes whatever is above 0 is foreground, with more its
values are classes. All files are checked first.

DIR gets best.safetensors and last.safetensors (for the other commands' --weights), last.pt (for
--resume), curve.csv and curve.png. Each is whole at any moment; a kill loses the steps since the last
checkpoint. With torchrun --nproc-per-node N -m fastunet train ..., N processes share each batch.

Exit code: 0 all fine, 1 the loss became NaN or infinite, 2 nothing could be started or a file not be written.""",
        **examples(
            "fastunet train dsb2018 --out run",
            "fastunet train plates --out run --steps 10000 --batch 16 --size 256 --device cuda --dtype bf16",
            "fastunet train plates --out tuned --weights run/best.safetensors --lr 4e-4 --plain 1",
            "fastunet train dsb2018 --out run --resume",
        ),
    )
    command.add_argument("data", type=Path, metavar="DATA")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if it is not there")
    network = command.add_mutually_exclusive_group()
    network.add_argument(
        "--config",
        type=a_config,
        default=weights.NUCLEI_CONFIG,
        metavar="JSON|FILE",
        help="a UNetConfig, as JSON or in a file (default: the shipped nuclei model's)",
    )
    network.add_argument("--weights", type=Path, metavar="FILE", help="begin with these weights, not at random")
    for name, kind, text in (
        ("steps", a_count, "of the optimiser"),
        ("batch", a_count, "windows a step, over all processes"),
        ("size", a_count, "side of a window in pixels"),
        ("lr", float, "highest learning rate, of AdamW"),
        ("weight_decay", float, "of AdamW"),
        ("warmup", float, "share of the steps over which the rate rises; then it falls along a cosine"),
        ("dice_weight", float, "of the soft Dice loss beside cross-entropy"),
        ("plain", float, "share of the steps, the last, with windows neither zoomed nor exposed otherwise"),
        ("ema", float, "decay of the averaged weights, which are validated and saved; 0: the latest"),
        ("every", a_count, "steps between two validations, each with a checkpoint"),
        ("seed", a_seed, "of weights and windows"),
    ):
        metavar, default = "X" if kind is float else "N", getattr(DEFAULTS, name)
        command.add_argument(
            _option(name), type=kind, default=default, metavar=metavar, help=f"{text} (default: {default})"
        )
    command.add_argument(
        "--val-fraction",
        type=float,
        default=0.2,
        metavar="X",
        help="of the images, where DATA has no val/ (default: %(default)s)",
    )
    command.add_argument(
        "--workers",
        type=int,
        default=4 if torch.cuda.is_available() else 0,
        metavar="N",
        help="processes that prepare windows beside the training (default here: %(default)s)",
    )
    command.add_argument("--resume", action="store_true", help="continue the run in DIR, if there is one")
    add_device_and_dtype(command)
    command.set_defaults(run=train)


def train(arguments: argparse.Namespace) -> int:
    """Check the data, train, say where the best weights are; of several processes the first talks.

    An error is said by one of those that have it.
    """
    for package in ("filelock", "matplotlib", "torchmetrics"):
        if importlib.util.find_spec(package) is None:
            raise SetupError(f"train: needs {package} (pip install 'fastunet[train]')")
    code = 0
    with contextlib.ExitStack() as stack:
        try:
            process = stack.enter_context(processes(arguments.device))
        except TrainingError as error:
            raise SetupError(f"--{error}") from None
        try:
            _train(arguments, process)
        except (SetupError, weights.WeightsError, DataError, TrainingError, ImageError) as error:
            message = _message(error)
            name = message.partition(":")[0]
            if name in {"config", *(field.name for field in dataclasses.fields(Settings))}:
                message = message.replace(name, _option(name), 1)
            lines = [f"fastunet: {line}" for line in message.splitlines()]
            process.once(message, lambda: new_console(stderr=True).print(*lines, sep="\n", soft_wrap=True))
            code = 1 if isinstance(error, DivergedError) else 2
    if process.count > 1:
        # Gloo's threads outlive their group. Now and then a process that was done was aborted while its interpreter
        # ended beside them ("terminate called without an active exception"), and by torchrun all others with it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _train(arguments: argparse.Namespace, process: Processes) -> None:
    model = _model(arguments)
    config = model.config
    settings = _settings(arguments, config)
    if config.in_channels not in (1, 3):
        raise SetupError(f"--config: expected 1 or 3 input channels, as images have, got {config.in_channels}")
    if not 0 < arguments.val_fraction < 1:
        raise SetupError(f"--val-fraction: expected a number in (0, 1), got {arguments.val_fraction}")
    if arguments.workers < 0:
        raise SetupError(f"--workers: expected a number of at least 0, got {arguments.workers}")
    if settings.batch % process.count:
        raise SetupError(f"--batch: expected a multiple of the {process.count} processes, got {settings.batch}")
    data = find(arguments.data, config.in_channels, config.out_channels, arguments.val_fraction)

    console = new_console()
    say = console.print if process.first else (lambda *_, **__: None)
    say(f"{len(data.train)} images to train on, {len(data.val)} to validate", soft_wrap=True)
    with new_progress(new_console(stderr=True)) as progress:
        task = progress.add_task("", total=settings.steps)
        clock, shown, dice, estimated = 0.0, None, "", False

        def on_start(step: int) -> None:
            if arguments.resume:
                found = f"{step} of {settings.steps} steps are done" if step else "holds no run, one begins"
                say(f"{arguments.out}: {found}", soft_wrap=True)

        def on_step(step: int, loss: Tensor) -> None:
            nonlocal clock, shown, estimated
            if shown is None:  # the first, which on resuming is not step 1, took its time to warm up
                clock, shown = time.perf_counter(), step
            elif step % SHOWN_EVERY == 0:
                value, now = loss.item(), time.perf_counter()
                speed = (step - shown) * settings.batch / (now - clock)
                text = f"loss {value:.3f}{dice}  {speed:.1f} images/s"
                progress.update(task, completed=step, description=text)
                minutes = (settings.steps - step) * settings.batch / speed / 60
                if not estimated and minutes > 1:
                    say(f"{speed:.1f} images/s: some {minutes:.0f} minutes to go, validation aside", soft_wrap=True)
                clock, shown, estimated = now, step, True

        def on_point(point: Point) -> None:
            nonlocal clock, shown, dice
            say(
                f"step {point.step}: loss {point.loss:.4f}, validation loss {point.val_loss:.4f}, "
                f"Dice {point.dice:.4f} (all pixels), {point.mean_dice:.4f} (mean of images), "
                f"{point.images_per_second:.1f} images/s",
                soft_wrap=True,
            )
            dice = f"  Dice {point.dice:.3f}"
            text = f"loss {point.loss:.3f}{dice}  {point.images_per_second:.1f} images/s"
            progress.update(task, completed=point.step, description=text)
            clock, shown = time.perf_counter(), point.step

        try:
            points = fit(
                model,
                data,
                arguments.out,
                settings,
                process=process,
                workers=arguments.workers,
                resume=arguments.resume,
                on_start=on_start,
                on_step=on_step,
                on_point=on_point,
            )
        except KeyboardInterrupt:
            if (arguments.out / STATE).exists():
                say(f"{arguments.out}: --resume goes on from its last checkpoint", soft_wrap=True)
            raise
    best = max(points, key=lambda point: point.dice)
    least = "" if round(best.dice, 4) else "; it finds nothing yet, and wants more steps"
    say(f"best Dice {best.dice:.4f}, at step {best.step}: {arguments.out / 'best.safetensors'}{least}", soft_wrap=True)


def _message(error: Exception) -> str:
    """What to say of it; one of a worker process comes within that process's traceback."""
    name = f"{type(error).__module__}.{type(error).__qualname__}: "
    return str(error).rpartition(name)[2].strip()


def _settings(arguments: argparse.Namespace, config: UNetConfig) -> Settings:
    try:
        settings = Settings(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)})
        settings.check(config)
        return settings
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        raise SetupError(f"{_option(name)}:{rest}") from None


def _model(arguments: argparse.Namespace) -> FastUNet:
    if arguments.weights is not None:
        return weights.load(arguments.weights)
    torch.manual_seed(arguments.seed)
    return FastUNet.from_config(arguments.config)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
