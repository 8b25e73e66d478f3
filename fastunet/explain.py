"""Which implementation each layer takes, why, and what it costs, without running anything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import dispatch, ops
from .built import as_built
from .config import UNetConfig
from .model import FastUNet
from .small import is_small
from .trace import Layer, Shape, describe_bytes, describe_flops, joins_head, takes_factors, totals, trace


@dataclass(frozen=True)
class Row:
    """One layer and what serves it.

    ``choice.implementation`` is ``"hopper"``, ``"hopper commuted"``, ``"commuted"`` or ``"triton"`` (kernels of
    :mod:`fastunet.kernels`), ``"cudnn"`` (PyTorch's convolution on a GPU) or ``"reference"`` (plain PyTorch on
    another device).
    """

    layer: Layer
    choice: dispatch.Choice
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Expected traffic: inputs, weights and outputs, each once; no map between two layers in one pass."""
        return self.layer.elements * self.dtype.itemsize

    def cells(self) -> tuple[str, ...]:
        """The row as text, one entry for each of :data:`COLUMNS`."""
        layer = self.layer
        return (
            layer.name,
            layer.op,
            " + ".join(map(describe_shape, layer.in_shapes)),
            describe_shape(layer.out_shape),
            describe_dtype(self.dtype),
            f"{layer.parameters:,}",
            describe_flops(layer.flops),
            describe_bytes(self.bytes),
            self.choice.implementation,
            self.choice.reason,
        )

    def to_dict(self) -> dict[str, Any]:
        """The layer's entries, ``implementation``, ``reason``, ``dtype`` and ``bytes``."""
        entries = {**dataclasses.asdict(self.layer), **dataclasses.asdict(self.choice)}
        return {**entries, "dtype": describe_dtype(self.dtype), "bytes": self.bytes}


COLUMNS = ("layer", "operator", "in", "out", "dtype", "parameters", "work", "bytes", "runs on", "because")
NUMERIC = ("parameters", "work", "bytes")  # columns that read best flush right


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``str()`` is a table, one line per layer, totals below."""

    input_size: Shape
    device: torch.device
    dtype: torch.dtype
    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        return totals([row.layer for row in self.rows])[0]

    @property
    def flops(self) -> int:
        return totals([row.layer for row in self.rows])[1]

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for JSON."""
        return {
            "input_size": list(self.input_size),
            "device": str(self.device),
            "dtype": describe_dtype(self.dtype),
            "parameters": self.parameters,
            "flops": self.flops,
            "bytes": self.bytes,
            "layers": [row.to_dict() for row in self.rows],
        }

    def headline(self) -> str:
        """Input, device, dtype and totals in one line."""
        return (
            f"input {describe_shape(self.input_size)}, {describe_dtype(self.dtype)} on {self.device}: "
            f"{self.parameters:,} parameters, {describe_flops(self.flops)}, {describe_bytes(self.bytes)} moved"
        )

    def __str__(self) -> str:
        table = [COLUMNS, *(row.cells() for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
        lines = [
            "  ".join(
                cell.rjust(width) if column in NUMERIC else cell.ljust(width)
                for column, cell, width in zip(COLUMNS, line, widths, strict=True)
            ).rstrip()
            for line in table
        ]
        return "\n".join([*lines, self.headline()])


def describe_shape(shape: Shape) -> str:
    """``describe_shape((1, 64, 256, 256))`` is ``"1x64x256x256"``."""
    return "x".join(map(str, shape))


def describe_dtype(dtype: torch.dtype) -> str:
    """``describe_dtype(torch.bfloat16)`` is ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def explain(
    model: FastUNet,
    input_size: Sequence[int],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Explanation:
    """Say which implementation every layer of ``model`` takes for inputs of ``input_size``, and why.

    Args:
        model: whose forward pass, in eval mode, is described.
        input_size: (N, C, H, W).
        device, dtype: of the input; the model's own by default.

    Raises:
        ValueError: ``model`` is no FastUNet, or ``input_size`` cannot go through it.
    """
    if not isinstance(model, FastUNet):
        raise ValueError(f"model: expected a FastUNet, got {type(model).__name__}")
    parameter = next(model.parameters())
    found = explain_config(
        model.config,
        input_size,
        parameter.device if device is None else torch.device(device),
        parameter.dtype if dtype is None else dtype,
    )
    if as_built(model):
        return found
    plain = "cudnn" if found.device.type == "cuda" else "reference"
    choice = dispatch.Choice(plain, "a layer of the model was replaced; the reference network runs as it is")
    n, _, h, w = found.input_size
    rows = tuple(Row(layer, choice, found.dtype) for layer in trace(model.config, h, w, n))
    return dataclasses.replace(found, rows=rows)


def explain_config(
    config: UNetConfig, input_size: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Explanation:
    """:func:`explain` of a FastUNet that need not exist: nothing is allocated."""
    size = tuple(input_size) if isinstance(input_size, Sequence) else (input_size,)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in size)
    least = config.minimum_size
    if len(size) != 4 or not whole or size[1] != config.in_channels or min(size[2:]) < least:
        raise ValueError(
            f"input_size: expected four positive integers (N, {config.in_channels}, H, W) with H and W of "
            f"at least {least} ({config.depth} poolings), got {size}"
        )
    batch, channels, height, width = size
    try:
        layers = trace(config, height, width, batch)
    except ValueError as error:  # of sizes that strides do not divide
        raise ValueError(f"input_size: {error}") from None
    rows = [Row(layer, _choose(layer, config, size, device, dtype), dtype) for layer in layers]
    if joins_head(config, layers):
        rows[-2:] = _with_head(rows[-2], rows[-1], config, device)
    return Explanation((batch, channels, height, width), device, dtype, tuple(rows))


def _with_head(conv: Row, head: Row, config: UNetConfig, device: torch.device) -> tuple[Row, Row]:
    """The last two rows, of what is one pass, if it is: the map between them is not moved."""
    layer = conv.layer
    of: Any = {"classes": head.layer.out_shape[1], "factors": takes_factors(config, layer, conv.dtype)}
    choice = ops.choose("conv2d_relu_head", layer.in_shapes, layer.weight_shape, device, conv.dtype, **of)
    if choice.implementation == "torch":
        return conv, head
    between = math.prod(layer.out_shape)

    def part(row: Row, choice: dispatch.Choice) -> Row:
        layer = dataclasses.replace(row.layer, elements=row.layer.elements - between)
        return Row(layer, choice, row.dtype)

    first = dataclasses.replace(choice, reason=f"{choice.reason}, with the head")
    return part(conv, first), part(head, dispatch.Choice(choice.implementation, f"in one pass with {layer.name}"))


def _choose(
    layer: Layer, config: UNetConfig, input_size: Sequence[int], device: torch.device, dtype: torch.dtype
) -> dispatch.Choice:
    """What serves one layer in eval mode, and why."""
    plain = "cudnn" if device.type == "cuda" else "reference"
    sizes = layer.in_shapes, layer.weight_shape
    factors = takes_factors(config, layer, dtype)
    choice = ops.choose(layer.op, *sizes, device, dtype, layer.mode, geometry=layer.geometry, factors=factors)
    if device.type == "cpu" and dispatch.asked_for() is None:
        causes = {
            "without padding": config.padding == "valid",
            "with instance norm": config.norm == "instance",
            "with such small layers": is_small(config, input_size, dtype),
        }
        cause = next((words for words, holds in causes.items() if holds), None)
        if cause is not None:
            why = dispatch.choose(device, dtype).reason
            return dispatch.Choice(plain, f"{why}; {cause} the reference network runs as it is")
    implementation = plain if choice.implementation == "torch" else choice.implementation
    apart = layer.norm is not None and (config.norm == "instance" or config.order == "conv_act_norm")
    if apart and dispatch.choose(device, dtype).implementation == "triton":
        return dispatch.Choice(implementation, f"{choice.reason}, then {config.norm} norm by a kernel")
    return dataclasses.replace(choice, implementation=implementation)
