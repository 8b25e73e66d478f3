"""The ``fastunet`` command.

Exit codes: 0 all fine, 1 some image failed or some check broke, 2 wrong usage or a setup that
cannot work (weights, device, output folder), 130 interrupted. Errors are one line each, on stderr.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence

from .. import weights
from . import bench, convert, describe, segment, train, verify
from .shared import Parser, SetupError, examples, new_console


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``argv`` defaults to the process's arguments."""
    # A plain kill takes Ctrl-C's way out, on which a half-written file is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return arguments.run(arguments)
    except (SetupError, weights.WeightsError) as error:
        new_console(stderr=True).print(f"fastunet: {error}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        new_console(stderr=True).print("fastunet: interrupted", soft_wrap=True)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fastunet",
        description="U-Net segmentation with fused Triton kernels.",
        **examples(
            "fastunet segment cells.png --out masks",
            "fastunet train dsb2018 --out run",
            "fastunet summary --size 256",
            "fastunet verify --weights mine.safetensors --dtype bf16",
            "fastunet convert unet_carvana.pth --out carvana.safetensors",
            "fastunet bench --quick",
            "fastunet info",
        ),
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (segment, train, describe, verify, convert, bench):
        module.add(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser
