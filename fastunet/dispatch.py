"""Which implementation serves a tensor of this dtype and device, and why.

Nothing is launched here and no kernel is imported, so that a choice can be shown
(``fastunet summary``, ``fastunet.explain``) without making it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MINIMUM_CAPABILITY = (8, 0)  # Ampere: the first with bf16, tf32 and asynchronous copies

_forced: ContextVar[str | None] = ContextVar("fastunet_forced_implementation", default=None)


@dataclass(frozen=True)
class Choice:
    """An implementation, ``"triton"`` or ``"torch"``, and one sentence that says why."""

    implementation: str
    reason: str


@cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the Triton kernels cannot serve ``device`` and ``dtype``; None if they can."""
    if not has_triton():
        return "Triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"{str(dtype).removeprefix('torch.')} is not a Triton kernel's dtype"
    if device.type == "cpu":
        return None if interpreting() else "the device is a CPU"
    if device.type != "cuda":
        return f"no kernels for device type {device.type!r}"
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """Pick the implementation of a fused operator for a tensor's device and dtype."""
    obstacle = why_not_triton(device, dtype)
    forced = _forced.get()
    if forced == "triton" and obstacle is not None:
        raise RuntimeError(f"the Triton kernels were asked for, but {obstacle}")
    if forced is not None:
        return Choice(forced, "asked for")
    if obstacle is not None:
        return Choice("torch", obstacle)
    if interpreting():
        # The interpreter is for checking kernels; it is thousands of times slower than torch.
        why = "the device is a CPU" if device.type == "cpu" else "TRITON_INTERPRET is set"
        return Choice("torch", f"{why} (interpreted kernels only when asked for)")
    return Choice("triton", "fused kernel")


@contextlib.contextmanager
def forced(implementation: str) -> Iterator[None]:
    """Within the block every operator takes ``"triton"`` or ``"torch"``, for checks and timing.

    Raises:
        ValueError: another name. RuntimeError at the operator: the kernels cannot run there.
    """
    if implementation not in ("triton", "torch"):
        raise ValueError(f"implementation: expected 'triton' or 'torch', got {implementation!r}")
    token = _forced.set(implementation)
    try:
        yield
    finally:
        _forced.reset(token)
