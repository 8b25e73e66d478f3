"""The data flow of a U-Net on paper: every fused operator with its shapes, parameters and work.

Nothing is allocated, so the trace of any network costs microseconds. The tutorial's two slips,
in one place:

- Its walk goes from 256x256 to a 32x32 bottleneck with 512 channels coming in. 32x32 is three
  poolings; the four that give 512 channels end at 16x16.
- Its code upsamples bilinearly (``align_corners=True``), which keeps 1024 channels, so the first
  decoder level concatenates 1024 + 512 = 1536; its text says 512 + 512 = 1024, which takes a
  convolution after the upsampling (``upsample="bilinear_conv"``) or a learned one (``"transpose"``).

>>> from fastunet.config import UNetConfig
>>> [layer.out_shape for layer in trace(UNetConfig(), 256, 256) if layer.name.startswith("bottleneck")]
[(1, 1024, 16, 16), (1, 1024, 16, 16)]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .config import UNetConfig
from .dispatch import geometry

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Layer:
    """One convolution of the forward pass in eval mode, and what its operator does with it.

    Attributes:
        name: path of the module that holds the weight, e.g. ``"downs.0.conv.net.0"``.
        op: ``"conv2d_relu"``, ``"conv2d_relu_pool"``, ``"upsample_concat_conv2d_relu"`` or
            ``"conv_transpose2x2"``. The name of the family: the head, for one, has no activation.
        in_shapes: (N, C, H, W) of each input; the decoder's fused operator reads x and its skip.
        out_shape: (N, C, H, W) of the output; the pooled map that ``conv2d_relu_pool`` also
            returns is the next layer's input.
        parameters: elements of the weight, the bias and the norm's scale and shift.
        flops: 2 x multiply-adds of the convolution. Interpolation, bias, norm and activation,
            about a hundredth of it, are not counted.
        elements: read and written, each once: inputs, weight, bias and outputs; of a norm that stays
            a pass of its own, the map twice more.
        mode: of ``"upsample_concat_conv2d_relu"``, how it upsamples.
        norm, activation: paths of the modules behind the convolution in the reference; None for
            none.
        stride, padding: of a convolution, as :func:`fastunet.ops.conv2d_relu` takes them.
    """

    name: str
    op: str
    in_shapes: tuple[Shape, ...]
    out_shape: Shape
    parameters: int
    flops: int
    elements: int = 0
    mode: str = "none"
    norm: str | None = None
    activation: str | None = None
    stride: tuple[int, int] = (1, 1)
    padding: str = "same"

    @property
    def geometry(self) -> str:
        """:func:`fastunet.dispatch.geometry`."""
        return geometry(self.stride, self.padding)

    @property
    def weight_shape(self) -> Shape:
        """(O, C, K, K), or (C, O, R, S) of a transposed convolution."""
        channels, (n, out, h, w) = sum(shape[1] for shape in self.in_shapes), self.out_shape
        if self.op == "conv_transpose2x2":
            return channels, out, h // self.in_shapes[0][2], w // self.in_shapes[0][3]
        side = math.isqrt(self.flops // (2 * channels * out * n * h * w))  # of the taps
        return out, channels, side, side


def trace(config: UNetConfig, height: int, width: int, batch: int = 1) -> list[Layer]:
    """Every layer that FastUNet runs for an input (batch, in_channels, height, width), in order.

    Raises:
        ValueError: ``batch`` below 1, or ``height`` or ``width`` too small for the poolings, or not
            what the strides divide.
    """
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    for name, size, step in zip(("height", "width"), (height, width), config.reductions, strict=True):
        if size < config.minimum_size:
            raise ValueError(f"{name}: expected at least {config.minimum_size} ({config.depth} poolings), got {size}")
        if config.downsample == "stride" and size % step:
            raise ValueError(f"{name}: expected a multiple of {step}, got {size}")
    return _Tracer(config, batch).run(height, width)


class _Tracer:
    def __init__(self, config: UNetConfig, batch: int) -> None:
        self.config, self.batch = config, batch
        self.layers: list[Layer] = []

    def run(self, height: int, width: int) -> list[Layer]:
        c = self.config
        x: Shape = (self.batch, c.in_channels, height, width)
        skips: list[Shape] = []
        for level in range(c.depth):
            x = self.stage(f"downs.{level}.conv.net", x, level)
            skips.append(x)
            if c.downsample == "max_pool":
                rows, cols = c.stride(level + 1)
                x = (*x[:2], x[2] // rows, x[3] // cols)
        x = self.stage("bottleneck.net", x, c.depth)
        for index, skip in enumerate(reversed(skips)):
            x = self.up(f"ups.{index}", x, skip, c.depth - 1 - index)
        self.layer("head", "conv2d_relu", (x,), c.out_channels, x[2:], kernel=1)
        return self.layers

    def stage(self, name: str, x: Shape, level: int) -> Shape:
        """An encoder level, or the bottleneck."""
        c, last = self.config, self.config.convs_down(level) - 1
        for index in range(last + 1):
            stride = c.stride(level) if c.downsample == "stride" and level and not index else (1, 1)
            # Instance norm needs the whole map before it can be pooled; eval-mode batch norm is a scale
            # and a shift of the weights.
            pools = level < c.depth and c.downsample == "max_pool" and c.stride(level + 1) == (2, 2)
            pools = pools and index == last and (c.norm is None or folds(c))
            x = self.unit(name, index, (x,), c.features[level], "conv2d_relu_pool" if pools else "conv2d_relu", stride)
        return x

    def up(self, name: str, x: Shape, skip: Shape, level: int) -> Shape:
        c, kind, mode = self.config, self.config.upsampling(level), "none"
        channels, (rows, cols) = c.upsampled_channels(level), c.stride(level + 1)
        if kind == "bilinear_conv":
            # A 1x1 convolution commutes with interpolation, whose weights sum to 1: before it,
            # the convolution reads a quarter of the pixels.
            x, mode = self.layer(f"{name}.up.1", "conv2d_relu", (x,), channels, x[2:], kernel=1), "bilinear"
        elif kind == "transpose":
            x = self.transpose(f"{name}.up", x, channels, rows, cols)
        elif kind == "nearest_conv":
            sources = x, (x[0], 0, 2 * x[2], 2 * x[3])  # no skip comes in
            op = "upsample_concat_conv2d_relu"
            x = self.unit(f"{name}.up", 0, sources, channels, op, first=1, mode="nearest")
        else:
            mode = kind
        scale = 1 if mode == "none" else 2
        size = scale * x[2], scale * x[3]
        if c.match == "center_crop":
            skip = (*skip[:2], *size)
        matches = size == skip[2:]
        if c.match == "replicate_pad" and not matches:  # no kernel repeats a border: it is given the upsampled map
            x, mode = (*x[:2], *skip[2:]), "none"
        middle, out = c.decoder_channels(level)
        last = c.convs_up(level) - 1
        sources = (x, skip)
        for index in range(last + 1):
            op = "conv2d_relu" if index else "upsample_concat_conv2d_relu"
            x = self.unit(f"{name}.conv.net", index, sources, out if index == last else middle, op, mode=mode)
            sources, mode = (x,), "none"
        return x

    def unit(
        self,
        parent: str,
        index: int,
        inputs: tuple[Shape, ...],
        channels: int,
        op: str,
        stride: tuple[int, int] = (1, 1),
        *,
        first: int = 0,
        mode: str = "none",
    ) -> Shape:
        """The ``index``-th 3x3 convolution of a block whose layers start at ``first``."""
        c, (_, _, h, w) = self.config, inputs[-1]  # of x and skip, the skip has the output's size
        padding = "same" if first else c.padding
        h, w = (h - 2, w - 2) if padding == "valid" else (-(-h // stride[0]), -(-w // stride[1]))
        place = first + index * (2 if c.norm is None else 3)
        behind = [f"{parent}.{place + 1}", f"{parent}.{place + 2}"]
        activation = behind.pop(0) if c.norm is None or c.order == "conv_act_norm" else behind.pop(1)
        norm = behind[0] if c.norm is not None else None
        return self.layer(
            f"{parent}.{place}", op, inputs, channels, (h, w), mode=mode, norm=norm, activation=activation,
            stride=stride, padding=padding,
        )  # fmt: skip

    def layer(
        self,
        name: str,
        op: str,
        inputs: tuple[Shape, ...],
        channels: int,
        size: tuple[int, int],
        *,
        kernel: int = 3,
        norm: str | None = None,
        **more: Any,
    ) -> Shape:
        n, h, w = self.batch, *size
        out = (n, channels, h, w)
        weight = kernel * kernel * sum(shape[1] for shape in inputs) * channels
        bias = channels if kernel == 1 or self.config.conv_bias else 0
        moved = sum(map(math.prod, inputs)) + weight + bias + math.prod(out)
        if op == "conv2d_relu_pool":
            moved += n * channels * (h // 2) * (w // 2)
        if norm is not None and not folds(self.config):
            moved += 2 * math.prod(out)
        parameters = weight + bias + (2 * channels if norm is not None else 0)
        flops = 2 * weight * n * h * w
        self.layers.append(Layer(name, op, inputs, out, parameters, flops, moved, norm=norm, **more))
        return out

    def transpose(self, name: str, x: Shape, channels: int, rows: int, cols: int) -> Shape:
        # Every input pixel meets all taps once.
        out = (x[0], channels, rows * x[2], cols * x[3])
        weight = rows * cols * x[1] * channels
        self.layers.append(
            Layer(
                name,
                "conv_transpose2x2",
                (x,),
                out,
                weight + channels,
                2 * weight * x[0] * x[2] * x[3],
                math.prod(x) + weight + channels + math.prod(out),
            )
        )
        return out


def joins_head(config: UNetConfig, layers: list[Layer]) -> bool:
    """Whether the head, the last layer, and the convolution before it can be one operator, in eval mode."""
    conv = layers[-2]
    in_decoder = conv.name.startswith("ups.") and conv.op == "conv2d_relu"
    return in_decoder and not conv.geometry and (conv.norm is None or folds(config))


def folds(config: UNetConfig) -> bool:
    """Whether norms are part of the convolutions before them, in eval mode."""
    return config.norm == "batch" and config.order == "conv_norm_act"


def takes_factors(config: UNetConfig, layer: Layer, dtype: torch.dtype) -> bool:
    """Whether its norm is factors, in eval mode, beside weights of ``dtype``, which would be rounded with it."""
    return layer.norm is not None and folds(config) and dtype.itemsize == 2


def totals(layers: list[Layer]) -> tuple[int, int]:
    """(parameters, flops) of all layers together."""
    return sum(layer.parameters for layer in layers), sum(layer.flops for layer in layers)


def describe_flops(flops: int) -> str:
    """Three digits and a unit: ``describe_flops(1_230_000_000)`` is ``"1.23 GFLOP"``."""
    return _with_prefix(flops, "FLOP")


def describe_bytes(count: int) -> str:
    """``describe_bytes(1_230_000)`` is ``"1.23 MB"``."""
    return _with_prefix(count, "B")


def _with_prefix(value: int, unit: str) -> str:
    rounded = float(f"{value:.2e}")  # first, so that 999.9 M becomes 1 G
    power = 0
    while rounded >= 1000 and power < 5:
        rounded, power = rounded / 1000, power + 1
    return f"{rounded:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}{unit}"
