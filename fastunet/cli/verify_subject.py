"""What ``fastunet verify`` checks: a model, its reference and inputs, as its arguments name them."""

from __future__ import annotations

import argparse
import importlib
import sys

import torch
from torch import Tensor, nn

from .. import weights
from ..config import UNetConfig
from ..images import ImageError, list_images, normalise, read_image
from ..model import FastUNet
from ..parity.fuzz import randomise
from ..trace import trace
from .shared import SetupError


def model_of(arguments: argparse.Namespace) -> FastUNet:
    if arguments.weights is None and arguments.config is not None:
        model = FastUNet.from_config(arguments.config)
        randomise(model, arguments.seed)
        return model.eval()
    path = arguments.weights or weights.NUCLEI
    if arguments.config is None:
        return weights.load(path)
    model = FastUNet.from_config(arguments.config)
    weights.load_into(model, weights.read(path)[1], str(path))
    return model.eval()


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def call_factory(name: str) -> nn.Module:
    module_name, colon, function = name.partition(":")
    if not colon or not function:
        raise SetupError(f"--factory: expected PACKAGE.MODULE:FUNCTION, got {name!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module in this folder, as with python -m
    try:
        made = getattr(importlib.import_module(module_name), function)()
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise SetupError(f"--factory: {name} failed ({one_line(error)})") from None
    if not isinstance(made, nn.Module):
        raise SetupError(f"--factory: expected {name} to return an nn.Module, got {type(made).__name__}")
    return made


def inputs_of(arguments: argparse.Namespace, config: UNetConfig) -> tuple[Tensor, str]:
    """(N, C, H, W), from the images or at random, and which they are."""
    channels = config.in_channels
    if arguments.images is None:
        paths, images = [], []
        height, width = arguments.size or (256, 256)
        shown = f"normal random numbers, seed {arguments.seed}"
    else:
        if channels not in (1, 3):
            raise SetupError(f"--images: expected a model of 1 or 3 channels, got {channels}")
        try:
            there = list_images(arguments.images)
            paths = there[: arguments.batch]
            images = [normalise(read_image(path), channels) for path in paths]
        except ImageError as error:
            raise SetupError(f"--images: {error}") from None
        except OSError as error:
            raise SetupError(f"--images: {arguments.images} cannot be listed ({error.strerror})") from None
        smallest = [min(256, *(image.shape[axis] for image in images)) for axis in (1, 2)]
        height, width = arguments.size or smallest
        for path, image in zip(paths, images, strict=True):
            if image.shape[1] < height or image.shape[2] < width:
                raise SetupError(
                    f"--size: {path} has {image.shape[1]}x{image.shape[2]} pixels, expected at least {height}x{width}"
                )
        names = ", ".join(path.name for path in paths)
        shown = f"{names}; {len(paths)} of {len(there)} in {arguments.images}, the middle {height}x{width} of each"
    check_size(height, width, config)
    if not images:
        generator = torch.Generator().manual_seed(arguments.seed)
        return torch.randn(arguments.batch, channels, height, width, generator=generator), shown
    tops = [((image.shape[1] - height) // 2, (image.shape[2] - width) // 2) for image in images]
    crops = [image[:, top : top + height, left : left + width] for image, (top, left) in zip(images, tops, strict=True)]
    return torch.stack(crops), shown


def check_size(height: int, width: int, config: UNetConfig) -> None:
    least = config.minimum_size
    if min(height, width) < least:
        raise SetupError(f"--size: expected at least {least}x{least} for this network, got {height}x{width}")
    try:
        trace(config, height, width)
    except ValueError as error:
        raise SetupError(f"--size: {error}") from None
