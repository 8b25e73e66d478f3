"""Weights on disk: safetensors with the configuration inside. Loading never runs code."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from .config import UNetConfig
from .files import atomic_write
from .model import FastUNet
from .reference import UNet

#: The small nuclei model that ships with the package (see ``nuclei.md`` beside it).
NUCLEI = Path(__file__).parent / "pretrained" / "nuclei.safetensors"
#: Its configuration, assumed for files that carry none. ``align_corners=False`` makes the network
#: shift-invariant by multiples of its pooling, so that tiles of a large image agree with the whole;
#: batch norm lets a net this small train quickly, and costs nothing once folded.
NUCLEI_CONFIG = UNetConfig(features=(16, 32, 64, 128, 256), align_corners=False, norm="batch")
_KEY = "fastunet_config"


class WeightsError(ValueError):
    """A weights file that cannot be used; the message is one line and names the file."""


def save(model: UNet, path: str | os.PathLike[str]) -> None:
    """Write a model's weights and configuration as safetensors; the file is whole or not there."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(path) as temporary:
        # Not save_file, which makes the file readable by its owner alone.
        temporary.write_bytes(serialise(state, metadata={_KEY: model.config.to_json()}))


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> FastUNet:
    """Build the network a weights file describes, in eval mode.

    Args:
        path: as for :func:`read`; a file without a configuration is taken for ``NUCLEI_CONFIG``.
        device: where to put the model.
        dtype: of its floating-point weights; float32 by default, whatever the file holds.

    Raises:
        WeightsError: as :func:`read` and :func:`load_into`.
    """
    config, state = read(path)
    model = FastUNet.from_config(config or NUCLEI_CONFIG)
    try:
        load_into(model, state, str(path))
    except WeightsError as error:
        note = "" if config else " (the file holds no configuration: the shipped nuclei model's was assumed)"
        raise WeightsError(f"{error}{note}") from None
    return model.to(device=device, dtype=dtype).eval()


def read(path: str | os.PathLike[str]) -> tuple[UNetConfig | None, dict[str, Tensor]]:
    """Read (configuration if the file carries one, state_dict) from safetensors, .pt or .pth.

    Raises:
        WeightsError: missing, corrupt, or a pickle that holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_KEY)
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return (UNetConfig.from_json(text) if text else None), state
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise WeightsError(f"{path}: not a usable safetensors file ({error})") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocol of pickles that are refused anyway
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch's own message advises to load the file with code allowed; ours must not.
        raise WeightsError(f"{path}: refused, damaged or more than a checkpoint of plain tensors") from None
    except Exception as error:  # damaged archives raise many types
        reason = str(error).partition(".")[0] or repr(error)
        raise WeightsError(f"{path}: not a checkpoint of plain tensors ({reason})") from None
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: expected a state_dict of tensors, got {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise WeightsError(f"{path}: expected a state_dict of tensors, {key!r} is {type(value).__name__}")
    return None, state


def load_into(model: UNet, state: dict[str, Tensor], source: str) -> None:
    """Load strictly, or raise WeightsError naming ``source`` and the first key or shape that differs."""
    wanted = model.state_dict()
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
    model.load_state_dict(state)
