"""Which implementation serves a tensor of this dtype and device, or a layer, and why.

A layer is served by ``"hopper"`` (Gluon, compute capability 9.0), ``"triton"`` (portable),
``"hopper commuted"`` or ``"commuted"`` (the same two, with a decoder's upsampling behind its products)
or ``"torch"`` (cuDNN), as a measured table has it; where none was measured, by ``"triton"``. Tables are
read once, so a choice depends on shapes alone, under ``torch.compile`` and graph capture as elsewhere.

A convolution has three steps that may be served apart: ``"forward"``, ``"dgrad"`` (the gradient of its
input) and ``"wgrad"`` (of its weight). On a GPU, ``"torch"`` is cuDNN.

Nothing is launched here and no kernel is imported, so that a choice can be shown
(``fastunet summary``, ``fastunet.explain``) without making it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch

from . import measured

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HOPPER = (9, 0)
MINIMUM_CAPABILITY = (8, 0)  # Ampere: the first with bf16, tf32 and asynchronous copies

STEPS = ("forward", "dgrad", "wgrad")
_HOPPERS = ("hopper", "hopper commuted")
_FOR_SOME_LAYERS = (*_HOPPERS, "commuted")  # the others are served by "triton"

_forced: ContextVar[dict[str, str]] = ContextVar("fastunet_forced_implementation", default={})  # noqa: B039


@dataclass(frozen=True)
class Choice:
    """One of :data:`measured.IMPLEMENTATIONS` and one sentence that says why.

    Attributes:
        entry: the measurement it follows, if any.
    """

    implementation: str
    reason: str
    entry: measured.Entry | None = None


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
    if forced not in (None, "torch") and obstacle is not None:
        raise RuntimeError(f"the Triton kernels were asked for, but {obstacle}")
    if forced in _FOR_SOME_LAYERS:
        return Choice("triton", f"{forced} kernels were asked for")
    if forced is not None:
        return Choice(forced, "asked for")
    if obstacle is not None:
        return Choice("torch", obstacle)
    if interpreting():
        # The interpreter is for checking kernels; it is thousands of times slower than torch.
        why = "the device is a CPU" if device.type == "cpu" else "TRITON_INTERPRET is set"
        return Choice("torch", f"{why} (interpreted kernels only when asked for)")
    return Choice("triton", "fused kernel" if step == "forward" else "deterministic kernel")


def why_not_hopper(device: torch.device) -> str | None:
    """The reason why no Hopper kernel can run on ``device``; None if they can."""
    if device.type != "cuda":
        return "the device is no Hopper GPU"
    capability = torch.cuda.get_device_capability(device)
    return None if capability == HOPPER else f"compute capability {capability[0]}.{capability[1]} is not 9.0"


def geometry(stride: Sequence[int], padding: str) -> str:
    """In words, how a convolution does not keep its map's size; empty if it does."""
    words = [] if tuple(stride) == (1, 1) else ["with a stride of {}x{}".format(*stride)]
    return " ".join(words if padding == "same" else [*words, "without padding"])


def choose_layer(
    device: torch.device,
    dtype: torch.dtype,
    key: str,
    obstacle: Callable[[str], str | None],
    step: str = "forward",
    alike: str = "",
) -> Choice:
    """Pick the implementation of a step of one layer.

    Args:
        key: of :func:`measured.layer_key`.
        obstacle: why one of those that serve some layers cannot serve this one's forward pass or dgrad, on a device
            where it runs; None if it can.
        alike: key of a layer that costs our own kernels as much, for where this one was not measured.
    """
    choice = choose(device, dtype, step)
    forced = _forced.get().get(step)
    if forced in _FOR_SOME_LAYERS and step != "wgrad":
        why = why_not_hopper(device) if forced in _HOPPERS else None
        if why is not None:
            raise RuntimeError(f"the Hopper kernels were asked for, but {why}")
        why = obstacle(forced)
        return Choice(forced, "asked for") if why is None else Choice("triton", f"{forced} was asked for, but {why}")
    if choice.implementation != "triton" or forced is not None or device.type != "cuda":
        return choice
    layers = measured.table(device)
    entry, words = layers.get(key), "measured, in microseconds"
    if entry is None and alike in layers:
        entry, which = layers[alike].of_ours(), "with" if alike.endswith("with factors") else "without"
        words = f"measured {which} factors, in microseconds"
    if entry is None:
        what = "this layer's shape" if layers else "this device"
        why = why_not_hopper(device) if step == "forward" else None
        no_hopper = "" if why is None else f"; no Hopper kernels, for {why}"
        return Choice("triton", f"{choice.reason}; no measurement of {what} yet{no_hopper}")
    if entry.implementation in _FOR_SOME_LAYERS:
        why = (why_not_hopper(device) if entry.implementation in _HOPPERS else None) or obstacle(entry.implementation)
        if why is not None:
            return Choice("triton", f"{choice.reason}; a table says {entry.implementation}, but {why}")
    times = ", ".join(f"{name} {time:.0f}" for name, time in sorted(entry.microseconds.items(), key=lambda i: i[1]))
    return Choice(entry.implementation, f"{words}: {times}", entry)


def table(device: torch.device) -> object:
    """What choices on ``device`` follow: another object when there are new measurements."""
    return measured.table(device) if device.type == "cuda" else None


def asked_for(step: str = "forward") -> str | None:
    """What the innermost block of :func:`forced` asks for."""
    return _forced.get().get(step)


@contextlib.contextmanager
def forced(implementation: str, *steps: str) -> Iterator[None]:
    """Within the block every operator takes one of :data:`measured.IMPLEMENTATIONS`, for checks and timing.

    What ``"hopper"`` (a stem, a head of two classes by itself, strides, maps without padding, a gradient but that of
    a convolution's input), ``"commuted"`` (all that upsamples nothing, is not padded, or is a gradient) and
    ``"hopper commuted"`` cannot serve takes ``"triton"``.

    Args:
        steps: those to which it applies; all by default. Of a backward pass the operators that ran
            forward within the block.

    Raises:
        ValueError: another name. RuntimeError at the operator: the kernels cannot run there.
    """
    if implementation not in measured.IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {measured.IMPLEMENTATIONS}, got {implementation!r}")
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        raise ValueError(f"steps: expected some of {STEPS}, got {unknown[0]!r}")
    token = _forced.set(_forced.get() | dict.fromkeys(steps or STEPS, implementation))
    try:
        yield
    finally:
        _forced.reset(token)
