"""``fastunet summary`` and ``fastunet info``: a network's data flow; versions and devices."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from .. import dispatch, weights
from ..config import UPSAMPLE, UNetConfig
from ..explain import COLUMNS, NUMERIC, explain_config
from .shared import (
    DTYPES,
    SetupError,
    a_config,
    a_count,
    a_size,
    add_device_and_dtype,
    examples,
    new_console,
    new_table,
)

TUTORIAL_NOTE = """\
The tutorial walks from 256x256 to a bottleneck of 512 channels at 32x32. That is three poolings
of size and four of channels; with four the bottleneck is 16x16. Its code upsamples bilinearly and
so keeps 1024 channels (1024 + 512 = 1536 at the first concatenation); its text says 512 + 512,
which is --upsample bilinear_conv or transpose."""


def add(commands: Any) -> None:
    """Add both commands to the parser's."""
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
            'fastunet summary --size 572 --config \'{"padding": "valid", "match": "center_crop"}\'',
        ),
    )
    command.add_argument("--size", type=a_size, default=(256, 256), metavar="SIDE|HxW", help="in pixels (default: 256)")
    command.add_argument("--batch", type=a_count, default=1, metavar="N", help="default: %(default)s")
    network = command.add_mutually_exclusive_group()
    network.add_argument("--upsample", choices=UPSAMPLE, default="bilinear", help="default: %(default)s")
    network.add_argument("--weights", type=Path, metavar="FILE", help="show the network of this file")
    network.add_argument("--config", type=a_config, metavar="JSON|FILE", help="show the network of this UNetConfig")
    add_device_and_dtype(command)
    command.set_defaults(run=summary)

    command = commands.add_parser(
        "info",
        help="show versions, devices and where the kernels can run",
        description="Show versions and devices, and for each device and dtype whether the kernels can run.",
        **examples("fastunet info"),
    )
    command.set_defaults(run=info)


def summary(arguments: argparse.Namespace) -> int:
    """Print the data flow of a network, from its description alone."""
    config: UNetConfig = arguments.config or UNetConfig(upsample=arguments.upsample)
    if arguments.weights is not None:
        config = weights.load(arguments.weights).config
    height, width = arguments.size
    if min(height, width) < config.minimum_size:
        least = config.minimum_size
        raise SetupError(f"--size: expected at least {least}x{least} for this network, got {height}x{width}")
    size = (arguments.batch, config.in_channels, height, width)
    try:
        explanation = explain_config(config, size, torch.device(arguments.device), DTYPES[arguments.dtype])
    except ValueError as error:  # of sizes that strides do not divide
        raise SetupError(f"--size: {error}") from None

    table = new_table(*COLUMNS[:-1], numeric=NUMERIC)
    for row in explanation.rows:
        table.add_row(*row.cells()[:-1])
    console = new_console()
    console.print(table)
    console.print(explanation.headline(), soft_wrap=True)
    for choice in dict.fromkeys(row.choice for row in explanation.rows):
        console.print(f"{choice.implementation}: {choice.reason}", soft_wrap=True)
    if arguments.weights is None and arguments.config is None:
        console.print(f"\n{TUTORIAL_NOTE}", soft_wrap=True)
    return 0


def info(arguments: argparse.Namespace) -> int:
    """Print versions, devices and where the kernels can run."""
    console = new_console()
    table = new_table("what", "version")
    table.add_row("fastunet", _version("fastunet"))
    table.add_row("torch", torch.__version__)  # with its build, as in 2.11.0+cu130
    table.add_row("triton", _version("triton"))
    table.add_row("python", platform.python_version())
    table.add_row("CUDA", torch.version.cuda or "none: this PyTorch is built without it")
    table.add_row("cuDNN", str(torch.backends.cudnn.version() or "none"))
    console.print(table)

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    table = new_table("device", "name", "capability", "memory", "SMs")
    for device in devices:
        if device.type == "cpu":
            table.add_row("cpu", platform.processor() or platform.machine(), "-", "-", "-")
            continue
        found = torch.cuda.get_device_properties(device)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        table.add_row(str(device), found.name, f"{found.major}.{found.minor}", memory, str(found.multi_processor_count))
    console.print(table)

    table = new_table("device", "dtype", "Triton kernels")
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
