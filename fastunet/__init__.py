"""FastUNet: the U-Net as a drop-in PyTorch module on fused Triton kernels.

>>> import torch, fastunet
>>> model = fastunet.FastUNet(in_channels=1, out_channels=2, features=(8, 16)).eval()
>>> model(torch.rand(1, 1, 32, 32)).shape
torch.Size([1, 2, 32, 32])
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from . import dispatch, ops, reference
from .config import UNetConfig
from .convert import convert
from .explain import explain
from .model import FastUNet
from .parity import verify
from .tune import tune

try:
    __version__ = version("fastunet")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.0.0+uninstalled"


def __getattr__(name: str) -> ModuleType:
    """``fastunet.train`` and the like, imported when they are first used."""
    if name in ("images", "predict", "train", "weights"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["FastUNet", "UNetConfig", "convert", "dispatch", "explain", "ops", "reference", "tune", "verify"]
