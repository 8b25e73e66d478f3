"""Files of weights, ours and other projects': what is read never runs code, what is written is whole."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from .files import atomic_write

CONFIG_KEY = "fastunet_config"  # of the metadata of files of ours

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
    except pickle.UnpicklingError:
        # torch's own message advises to load the file with code allowed; ours must not.
        raise WeightsError(f"{path}: refused, damaged or more than a checkpoint of plain tensors") from None
    except Exception as error:  # damaged archives raise many types
        reason = str(error).partition(".")[0] or repr(error)
        raise WeightsError(f"{path}: not a checkpoint of plain tensors ({reason})") from None
    if not isinstance(entries, dict):
        raise WeightsError(f"{path}: expected a state_dict of tensors, got {type(entries).__name__}")
    return {}, entries


@contextmanager
def _numpy_numbers() -> Iterator[None]:
    scalar = type(np.float64(0)).__reduce__(np.float64(0))[0]  # NumPy 1 and 2 have it in different places
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    with torch.serialization.safe_globals([*_NUMPY_NUMBERS, *names]):
        yield
