"""Which implementation serves a tensor of this dtype and device, and why.

A convolution has three steps that may be served apart: ``"forward"``, ``"dgrad"`` (the gradient of its
input) and ``"wgrad"`` (of its weight). On a GPU, ``"torch"`` is cuDNN.

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

STEPS = ("forward", "dgrad", "wgrad")

_forced: ContextVar[dict[str, str]] = ContextVar("fastunet_forced_implementation", default={})  # noqa: B039


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


def choose(device: torch.device, dtype: torch.dtype, step: str = "forward") -> Choice:
    """Pick the implementation of a step of a fused operator for a tensor's device and dtype."""
    obstacle = why_not_triton(device, dtype)
    forced = _forced.get().get(step)
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
    if step != "forward":
        # Where cuDNN's is faster, its name belongs here; no GPU has been asked yet.
        return Choice("triton", "deterministic kernel; cuDNN's has not been timed against it")
    return Choice("triton", "fused kernel")


@contextlib.contextmanager
def forced(implementation: str, *steps: str) -> Iterator[None]:
    """Within the block every operator takes ``"triton"`` or ``"torch"``, for checks and timing.

    Args:
        steps: those to which it applies; all by default. Of a backward pass the operators that ran
            forward within the block.

    Raises:
        ValueError: another name. RuntimeError at the operator: the kernels cannot run there.
    """
    if implementation not in ("triton", "torch"):
        raise ValueError(f"implementation: expected 'triton' or 'torch', got {implementation!r}")
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        raise ValueError(f"steps: expected some of {STEPS}, got {unknown[0]!r}")
    token = _forced.set(_forced.get() | dict.fromkeys(steps or STEPS, implementation))
    try:
        yield
    finally:
        _forced.reset(token)
