"""Weights on disk: safetensors with the configuration inside. Loading never runs code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import CONFIG_KEY, WeightsError, check, check_state, ours, save
from .checkpoint import read as read_file
from .config import UNetConfig
from .convert import convert
from .model import FastUNet
from .reference import UNet

__all__ = ["NUCLEI", "NUCLEI_CONFIG", "WeightsError", "load", "load_into", "read", "save"]

#: The small nuclei model that ships with the package (see ``nuclei.md`` beside it).
NUCLEI = Path(__file__).parent / "pretrained" / "nuclei.safetensors"
#: Its configuration, assumed for files that carry none. ``align_corners=False`` makes the network
#: shift-invariant by multiples of its pooling, so that tiles of a large image agree with the whole;
#: batch norm lets a net this small train quickly, and costs nothing once folded.
NUCLEI_CONFIG = UNetConfig(features=(16, 32, 64, 128, 256), align_corners=False, norm="batch")


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> FastUNet:
    """Build the network a weights file describes, in eval mode.

    Args:
        path: a file that :func:`save` wrote; one without a configuration, which is taken for
            ``NUCLEI_CONFIG`` where it has FastUNet's keys and batch norm; or one that :func:`fastunet.convert`
            recognises.
        device: where to put the model.
        dtype: of its floating-point weights; float32 by default, whatever the file holds.

    Raises:
        WeightsError: as :func:`read`, :func:`load_into` and :func:`fastunet.convert`; before memory is taken.
    """
    metadata, entries = read_file(path)
    if CONFIG_KEY not in metadata and not _like_nuclei(entries):
        return convert(path).to(device=device, dtype=dtype or torch.float32).eval()
    config, state, origin = ours(metadata, entries, str(path))
    try:
        check(config or NUCLEI_CONFIG, state, str(path))
    except WeightsError as error:
        note = "" if config else " (the file holds no configuration: the shipped nuclei model's was assumed)"
        raise WeightsError(f"{error}{note}") from None
    model = FastUNet.from_config(config or NUCLEI_CONFIG)
    model.load_state_dict(state)
    model.origin = origin
    return model.to(device=device, dtype=dtype).eval()


def _like_nuclei(entries: dict[str, Any]) -> bool:
    """Not by the convolutions' names, which are the tutorial's, so that any network of its blocks may have them."""
    return "bottleneck.net.1.running_mean" in entries and "head.weight" in entries


def read(path: str | os.PathLike[str]) -> tuple[UNetConfig | None, dict[str, Tensor]]:
    """Read (configuration if the file carries one, state_dict) from safetensors, .pt or .pth.

    Raises:
        WeightsError: missing, corrupt, or a pickle that holds more than tensors.
    """
    config, state, _ = ours(*read_file(path), str(path))
    return config, state


def load_into(model: UNet, state: dict[str, Tensor], source: str) -> None:
    """Load strictly, or raise WeightsError naming ``source`` and the first key or shape that differs."""
    check_state(model, state, source)
    model.load_state_dict(state)
