"""Measured tables: for a device, which implementation was fastest for which layer.

A table is JSON: what it was measured on, and for each layer (:func:`layer_key`) the implementation, its launch
configuration and its time. One for a device may come with the package (``fastunet/tables/<device>.json``); what
:func:`fastunet.tune` measures goes to the user's cache, a file for each device and version, and comes first.
Tables are read once, before the first launch on a device; nothing is timed or written here.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

IMPLEMENTATIONS = ("hopper", "hopper commuted", "commuted", "triton", "torch")  # torch: cuDNN
SHIPPED = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Entry:
    """What was fastest for a layer.

    Attributes:
        microseconds: of each implementation that was timed; its fastest configuration.
        config: fields of the launch configuration; None for the launcher's own choice.
    """

    implementation: str
    microseconds: dict[str, float]
    config: dict[str, Any] | None = None

    def of_ours(self) -> Entry | None:
        """Without cuDNN: what was the fastest of our own kernels, if any was timed."""
        times = {name: time for name, time in self.microseconds.items() if name != "torch"}
        if self.implementation in times or not times:
            return replace(self, microseconds=times) if times else None
        return Entry(min(times, key=lambda name: times[name]), times)


class Table(dict[str, Entry]):
    """Entries by layer, and ``choices`` that followed from them: those of a table that is read anew are made anew."""

    def __init__(self) -> None:
        self.choices: dict[Any, Any] = {}


def layer_key(
    op: str,
    maps: Sequence[Sequence[int]],
    weight: Sequence[int],
    dtype: torch.dtype,
    mode: str,
    step: str = "forward",
    geometry: str = "",
    classes: int = 0,
    factors: bool = False,
) -> str:
    """``conv2d_relu_pool 1x64x256x256 by 64x64x3x3 bfloat16``: a layer, as tables name it.

    Args:
        op: of :mod:`fastunet.ops`. maps: shape of each source. weight: its shape.
        mode: how the first source is upsampled; ``"none"`` if it is not.
        step: of :data:`fastunet.dispatch.STEPS`. geometry: of :func:`fastunet.dispatch.geometry`.
        classes: of the head of ``"conv2d_relu_head"``. factors: whether its bias is (2, O), a norm's.
    """
    sources = " + ".join("x".join(map(str, shape)) for shape in maps)
    upsampled = "" if mode == "none" else f" {mode}"
    by = "x".join(map(str, weight)) + (f" to {classes}" if classes else "")
    key = f"{op}{upsampled} {sources} by {by} {str(dtype).removeprefix('torch.')}"
    key += (f" {geometry}" if geometry else "") + (" with factors" if factors else "")
    return key if step == "forward" else f"{step} of {key}"


def versions(device: torch.device) -> dict[str, str]:
    """What a measurement holds for: the device and everything that makes its code."""
    return {
        "device": torch.cuda.get_device_name(device),
        "fastunet": _version("fastunet"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cudnn": str(torch.backends.cudnn.version()),
    }


def shipped_name(device: str) -> str:
    """``"NVIDIA H200"`` -> ``"nvidia-h200.json"``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()) + ".json"


def cache_path(device: torch.device) -> Path:
    """The user's table for this device and these versions."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found = versions(device)
    name = "-".join([found["device"], *(f"{k}{v}" for k, v in found.items() if k != "device")])
    return root / "fastunet" / (re.sub(r"[^A-Za-z0-9.+]+", "-", name) + ".json")


@cache
def table(device: torch.device) -> Table:
    """Layers measured on this kind of device; empty if none were. The user's own come first.

    A file that cannot be read, or that was measured elsewhere, is ignored with a warning.
    """
    expected = versions(device)
    paths = [SHIPPED / shipped_name(expected["device"])]
    try:
        paths.append(cache_path(device))
    except RuntimeError as error:  # no home directory
        warnings.warn(f"no table of this user's measurements: {error}", stacklevel=2)
    entries = Table()
    # Of a shipped table only the device must be this one: it was measured for the package, not for a version.
    for path, must_match in zip(paths, (("device",), tuple(expected)), strict=False):
        try:
            entries |= read(path, {name: expected[name] for name in must_match})
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            warnings.warn(f"{path}: not a table of measurements for this machine, ignored: {error}", stacklevel=2)
    return entries


def read(path: Path, expected: dict[str, str]) -> dict[str, Entry]:
    """The layers of a table.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: no such table, or one measured elsewhere.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in expected.items():
        if content["measured_on"][name] != value:
            raise ValueError(f"measured with {name} {content['measured_on'][name]}, not {value}")
    entries = {key: Entry(**fields) for key, fields in content["layers"].items()}
    for key, entry in entries.items():
        times = entry.microseconds.values()
        if entry.implementation not in IMPLEMENTATIONS or not all(type(t) in (int, float) and t > 0 for t in times):
            raise ValueError(f"{key}: {entry}")
        if entry.config is not None and not all(type(value) in (int, bool) for value in entry.config.values()):
            raise ValueError(f"{key}: {entry}")
    return entries


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"  # an uninstalled checkout
