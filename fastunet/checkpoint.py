"""Files of weights, ours and other projects': what is read never runs code, what is written is whole."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from .config import UNetConfig
from .files import atomic_write
from .origin import Origin
from .reference import UNet

CONFIG_KEY = "fastunet_config"  # in the metadata of a FastUNet's file

# What a number of NumPy's is pickled as; training logs in checkpoints hold some. They build numbers, nothing else.
_NUMPY_NUMBERS: list[Any] = [np.dtype, *(type(np.dtype(kind)) for kind in "fdeilq?")]


class WeightsError(ValueError):
    """Weights that cannot be used; the message is one line and names the file or argument."""


def write(path: str | os.PathLike[str], state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata as safetensors; the file is whole or not there."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic_write(path) as temporary:
        # Not save_file, which makes the file readable by its owner alone.
        temporary.write_bytes(serialise(state, metadata=metadata))


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a model's weights and configuration as safetensors; the file is whole or not there.

    Where the model was converted, the file also holds what :func:`fastunet.convert.export` needs.

    Args:
        model: a :class:`fastunet.FastUNet` or :class:`fastunet.reference.UNet`.

    Raises:
        ValueError: another model. OSError: the file cannot be written.
    """
    if not isinstance(model, UNet):
        raise ValueError(f"model: expected a FastUNet or a reference.UNet, got {type(model).__name__}")
    origin = getattr(model, "origin", None)
    tensors, metadata = ({}, {}) if origin is None else origin.to_file()
    write(path, {**model.state_dict(), **tensors}, {CONFIG_KEY: model.config.to_json(), **metadata})


def ours(
    metadata: Mapping[str, str], entries: Mapping[str, Any], source: str
) -> tuple[UNetConfig | None, dict[str, Tensor], Origin | None]:
    """(configuration if there is one, state_dict, origin if there is one) of what :func:`read` gave.

    Raises:
        WeightsError: no state_dict of tensors, or a configuration that this version does not know.
    """
    try:
        config = UNetConfig.from_json(metadata[CONFIG_KEY]) if CONFIG_KEY in metadata else None
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{source}: not a usable safetensors file ({error})") from None
    for key, value in entries.items():
        if not isinstance(value, Tensor):
            raise WeightsError(f"{source}: expected a state_dict of tensors, {key!r} is {type(value).__name__}")
    state = {key: value for key, value in entries.items() if not key.startswith(Origin.PREFIX)}
    return config, state, Origin.from_file(metadata, entries)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Read (metadata, entries) from safetensors, .pt or .pth; only safetensors have metadata.

    Raises:
        WeightsError: missing, corrupt, or a pickle that holds more than tensors, plain values and
            containers of them; such a pickle is refused before any of its code runs.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise WeightsError(f"{path}: not a usable safetensors file ({error})") from None
    try:
        with warnings.catch_warnings(), _numpy_numbers():
            warnings.simplefilter("ignore")  # about the protocol of pickles that are refused anyway
            entries = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception:
        # Damaged files raise many types. torch's own message advises to load them with code allowed; ours must not.
        raise WeightsError(
            f"{path}: refused, damaged or more than a checkpoint of plain tensors; save state_dict()"
        ) from None
    if not isinstance(entries, dict):
        raise WeightsError(f"{path}: expected a state_dict of tensors, got {type(entries).__name__}")
    return {}, entries


@contextmanager
def _numpy_numbers() -> Iterator[None]:
    scalar: Any = np.float64(0).__reduce__()[0]  # NumPy 1 and 2 have it in different places
    names: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    with torch.serialization.safe_globals([*_NUMPY_NUMBERS, *names]):
        yield


def check(config: UNetConfig, state: Mapping[str, Tensor], source: str) -> None:
    """Raise unless a network of ``config`` has the keys and shapes of ``state``.

    Takes no memory for weights: a configuration from a file may claim more than there is.

    Raises:
        WeightsError: names ``source`` and the first key or shape that differs.
    """
    levels = range(config.depth + 1)
    convs = sum(config.convs_down(level) + (config.convs_up(level) if level < config.depth else 0) for level in levels)
    if convs > len(state):
        raise WeightsError(f"{source}: expected weights of {convs} 3x3 convolutions, found {len(state)} tensors")
    try:
        with torch.device("meta"):
            network = UNet.from_config(config)
    except RuntimeError as error:  # sizes beyond 64 bits
        raise WeightsError(f"{source}: not a usable configuration ({str(error).splitlines()[0]})") from None
    check_state(network, state, source)


def check_state(network: UNet, state: Mapping[str, Tensor], source: str) -> None:
    """Raise WeightsError that names ``source`` and the first key or shape in which ``state`` is not the network's."""
    wanted = network.state_dict()
    for key, tensor in wanted.items():
        if key not in state:
            raise WeightsError(f"{source}: key {key!r} is missing")
        if state[key].shape != tensor.shape:
            raise WeightsError(
                f"{source}: key {key!r} has shape {tuple(state[key].shape)}, expected {tuple(tensor.shape)}"
            )
    for key in state:
        if key not in wanted:
            raise WeightsError(f"{source}: key {key!r} is not part of this network")
