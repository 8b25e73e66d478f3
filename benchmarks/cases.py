"""What is measured, as data. A case says what to compute; providers.py says who computes it.

Names read ``infer seed 256x256 b16 bf16`` or ``op downs.1.conv.net.0 256x256 b1 fp16``: what, the
network's image size, batch, dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastunet.config import UNetConfig
from fastunet.trace import Layer, trace

#: tf32 and fp32 are both float32; tf32 rounds the factors of products on tensor cores.
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}

SEED = UNetConfig()
#: The layout of milesial/Pytorch-UNet with ``bilinear=False``: batch norm, transposed convolutions, RGB.
MILESIAL_TRANSPOSE = UNetConfig(in_channels=3, upsample="transpose", norm="batch")
#: Its default, ``bilinear=True``: half the bottleneck, and levels that narrow in their first convolution.
MILESIAL_BILINEAR = UNetConfig(
    in_channels=3,
    features=(64, 128, 256, 512, 512),
    decoder_features=((64, 64), (128, 64), (256, 128), (512, 256)),
    norm="batch",
)
#: The seed's and milesial's networks in small, so that a CPU is done in seconds.
SMALL = UNetConfig(features=(16, 32, 64, 128, 256))
SMALL_MILESIAL = UNetConfig(
    in_channels=3,
    features=(16, 32, 64, 128, 128),
    decoder_features=((16, 16), (32, 16), (64, 32), (128, 64)),
    norm="batch",
)
SMALL_TRANSPOSE = UNetConfig(in_channels=3, features=SMALL.features, upsample="transpose", norm="batch")
NETWORKS = {
    "seed": SEED,
    "seed-transpose": dataclasses.replace(SEED, upsample="transpose"),
    "milesial-transpose": MILESIAL_TRANSPOSE,
    "milesial-bilinear": MILESIAL_BILINEAR,
    "pytorch_unet": MILESIAL_BILINEAR,  # the name it has in torchbench
    "small": SMALL,
    "small-milesial": SMALL_MILESIAL,
    "small-transpose": SMALL_TRANSPOSE,
}


@dataclass(frozen=True)
class Case:
    """One computation.

    Attributes:
        kind: ``"op"`` (one fused operator), ``"infer"`` (a forward pass) or ``"train"`` (forward,
            backward, optimiser).
        network: a key of ``NETWORKS``. dtype: a key of ``DTYPES``.
        batch, height, width: of the network's input.
        operator: for ``"op"``, a name of :func:`operators`.
        autocast: of inference, float32 weights under ``torch.autocast`` to ``dtype``. (Training in
            16 bits always runs so.)
    """

    kind: str
    network: str
    dtype: str
    batch: int
    height: int
    width: int
    operator: str | None = None
    autocast: bool = False

    @property
    def name(self) -> str:
        what = self.network if self.operator is None else f"{self.network} {self.operator}"
        name = f"{self.kind} {what} {self.height}x{self.width} b{self.batch} {self.dtype}"
        return f"{name} autocast" if self.autocast else name

    @property
    def is_mixed(self) -> bool:
        """Whether weights are float32 and autocast takes the convolutions to ``dtype``."""
        return self.dtype in ("fp16", "bf16") and (self.autocast or self.kind == "train")

    @property
    def config(self) -> UNetConfig:
        return NETWORKS[self.network]

    @property
    def layers(self) -> list[Layer]:
        """The fused operators of the network, or the one operator."""
        if self.operator is None:
            return trace(self.config, self.height, self.width, self.batch)
        return [operators(self.config, self.height, self.width, self.batch)[self.operator]]

    @property
    def channels(self) -> str:
        """``"64>128"`` of an operator, ``"1>64..1024>2"`` of a network."""
        if self.operator is not None:
            (layer,) = self.layers
            return f"{'+'.join(str(shape[1]) for shape in layer.in_shapes)}>{layer.out_shape[1]}"
        c = self.config
        return f"{c.in_channels}>{c.features[0]}..{c.features[-1]}>{c.out_channels}"

    @property
    def flops(self) -> int:
        """2 x multiply-adds of the convolutions; three times as many for a training step."""
        return sum(layer.flops for layer in self.layers) * (3 if self.kind == "train" else 1)

    @property
    def bytes(self) -> int:
        """Each fused operator's inputs, weights and results once; three times that for a training step."""
        elements = sum(layer.elements for layer in self.layers)
        return elements * DTYPES[self.dtype].itemsize * (3 if self.kind == "train" else 1)


def operators(config: UNetConfig, height: int, width: int, batch: int) -> dict[str, Layer]:
    """Every distinct operator of a network by name: its layers, and each level's upsampling with concatenation alone.

    Layers of one shape are one operator, named by the first of them.
    """
    found: dict[str, Layer] = {}
    seen = set()
    for layer in trace(config, height, width, batch):
        shape = (layer.op, layer.in_shapes, layer.out_shape, layer.geometry, layer.activation is None)
        if shape not in seen:
            seen.add(shape)
            found[layer.name] = layer
        if layer.op == "upsample_concat_conv2d_relu" and layer.mode != "none":
            x, skip = layer.in_shapes
            out = (batch, x[1] + skip[1], *skip[2:])
            name = f"{layer.name.partition('.conv')[0]}.concat"
            moved = sum(map(math.prod, (x, skip, out)))
            found[name] = Layer(name, "upsample_concat", layer.in_shapes, out, 0, 0, moved, mode=layer.mode)
    return found


def cases(device: str) -> list[Case]:
    """All cases of a device type, the most informative first: networks, then training, then operators."""
    return list(_cuda() if device == "cuda" else _cpu())


def quick(device: str) -> list[Case]:
    """A few of :func:`cases` that tell most, in that order, for the first minutes on a machine."""
    if device == "cpu":
        return list(itertools.islice(_cpu(), 6))
    seed = functools.partial(Case, "infer", "seed", "bf16")
    operator = functools.partial(Case, "op", "seed", "bf16", 16, 256, 256)
    names = ("downs.0.conv.net.2", "ups.3.concat", "ups.3.conv.net.0", "downs.0.conv.net.0", "bottleneck.net.2", "head")
    return [
        seed(16, 256, 256),
        *map(operator, names[:3]),
        seed(1, 256, 256),
        Case("train", "seed", "bf16", 16, 256, 256),
        seed(8, 512, 512),
        *map(operator, names[3:]),
        Case("infer", "pytorch_unet", "bf16", 1, 640, 959, autocast=True),
        Case("infer", "milesial-transpose", "bf16", 16, 256, 256),
    ]


def _cuda() -> Iterator[Case]:
    for dtype in ("bf16", "fp16", "tf32"):
        for size, batch in ((256, 16), (256, 1), (512, 8), (512, 1), (1024, 1)):
            yield Case("infer", "seed", dtype, batch, size, size)
        for network in ("milesial-bilinear", "milesial-transpose"):
            for batch in (1, 16):
                yield Case("infer", network, dtype, batch, 256, 256)
        if dtype in ("bf16", "fp16"):
            yield Case("infer", "pytorch_unet", dtype, 1, 640, 959, autocast=True)
    for dtype in ("bf16", "fp16", "tf32"):
        for size, batch in ((256, 16), (512, 4)):
            yield Case("train", "seed", dtype, batch, size, size)
    for dtype in ("bf16", "fp16", "tf32", "fp32"):
        for size in (256, 512):
            for batch in (16, 1):
                for name in operators(SEED, size, size, batch):
                    yield Case("op", "seed", dtype, batch, size, size, name)
                for name, layer in operators(NETWORKS["seed-transpose"], size, size, batch).items():
                    if layer.op == "conv_transpose2x2":
                        yield Case("op", "seed-transpose", dtype, batch, size, size, name)


def _cpu() -> Iterator[Case]:
    yield Case("infer", "small", "fp32", 1, 128, 128)
    yield Case("infer", "small", "fp32", 4, 64, 64)
    yield Case("infer", "seed", "fp32", 1, 128, 128)
    yield Case("infer", "seed", "fp32", 1, 256, 256)
    yield Case("infer", "small-milesial", "fp32", 1, 128, 128)
    yield Case("infer", "small-milesial", "bf16", 1, 80, 120, autocast=True)
    yield Case("infer", "small-transpose", "fp32", 1, 128, 128)
    yield Case("train", "small", "fp32", 4, 64, 64)
    for name in operators(SMALL, 64, 64, 1):
        yield Case("op", "small", "fp32", 1, 64, 64, name)
    for name, layer in operators(SMALL_TRANSPOSE, 64, 64, 1).items():
        if layer.op == "conv_transpose2x2":
            yield Case("op", "small-transpose", "fp32", 1, 64, 64, name)
