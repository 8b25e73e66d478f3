"""Weights on disk: safetensors with the configuration inside. Loading never runs code."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import UNetConfig
from .reference import UNet

#: The small nuclei model that ships with the package (see ``nuclei.md`` beside it).
NUCLEI = Path(__file__).parent / "weights" / "nuclei.safetensors"
_KEY = "fastunet_config"


class WeightsError(ValueError):
    """A weights file that cannot be used; the message is one line and names the file."""


def save(model: UNet, path: str | os.PathLike[str]) -> None:
    """Write a model's weights and configuration, under a temporary name first."""
    path = Path(path)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        save_file(state, temporary, metadata={_KEY: model.config.to_json()})
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
                state = {name: file.get_tensor(name) for name in file.keys()}
            return (UNetConfig.from_json(text) if text else None), state
        except (SafetensorError, ValueError) as error:
            raise WeightsError(f"{path}: not a usable safetensors file ({error})") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many types on files it refuses
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise WeightsError(f"{path}: not a checkpoint of plain tensors ({reason[:120]})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: expected a state_dict of tensors, got {type(state).__name__}")
    return None, state


def load_into(model: UNet, state: dict[str, Tensor], source: str) -> None:
    """Load strictly, or raise WeightsError naming the first key or shape that differs."""
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
