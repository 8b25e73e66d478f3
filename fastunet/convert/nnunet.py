"""nnU-Net's PlainConvUNet in two dimensions, of the package dynamic-network-architectures.

Its state_dict has every tensor of the encoder four times, and a head for each level of the decoder;
that of full resolution is converted, the others are kept for the way back.
"""

from __future__ import annotations

from typing import Any

from ..config import UNetConfig
from ..origin import Layout, Level, Unit
from .family import Family, Misfit, Shapes, count, norm_at, units


def _read(shapes: Shapes) -> dict[str, Any]:
    depth = count(shapes, "encoder.stages.{}.0.convs.0.conv") - 1
    convs = [count(shapes, f"encoder.stages.{i}.0.convs.{{}}.conv") for i in range(depth + 1)]
    back = [count(shapes, f"decoder.stages.{i}.convs.{{}}.conv") for i in range(depth)]
    strides = []
    for i in reversed(range(depth)):  # a transposed convolution's filter is its stride
        shape = shapes.get(f"decoder.transpconvs.{i}.weight", ())
        if len(shape) != 4:
            raise Misfit(f"key 'decoder.transpconvs.{i}.weight' has shape {shape}, expected 4 dimensions")
        strides.append(shape[2:])
    return {
        "features": (1,) * (depth + 1),
        "norm": norm_at(shapes, "encoder.stages.0.0.convs.0.norm"),
        "upsample": "transpose",
        "encoder_convs": tuple(convs),
        "decoder_convs": tuple(reversed(back)),
        "strides": None if set(strides) <= {(2, 2)} else tuple(strides),
    }


def _convs(path: str, number: int) -> tuple[Unit, ...]:
    return units(f"{path}.convs.{{}}", *((f"{i}.conv", f"{i}.norm") for i in range(number)))


def _layout(config: UNetConfig) -> Layout:
    depth = config.depth
    return Layout(
        encoder=tuple(_convs(f"encoder.stages.{i}.0", config.convs_down(i)) for i in range(depth + 1)),
        decoder=tuple(
            Level(Unit(f"decoder.transpconvs.{i}", ""), _convs(f"decoder.stages.{i}", config.convs_up(depth - 1 - i)))
            for i in range(depth)
        ),
        head=f"decoder.seg_layers.{depth - 1}",
    )


def _twins(path: str) -> tuple[str, ...]:
    block, _, last = path.rpartition(".")
    if last not in ("conv", "norm"):
        return ()
    again = f"{block}.all_modules.{'conv norm'.split().index(last)}"
    inside = (f"decoder.{path}", f"decoder.{again}") if path.startswith("encoder.") else ()
    return again, *inside


def _unused(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    heads = {}
    for i in range(config.depth - 1):
        heads[f"decoder.seg_layers.{i}.weight"] = (
            config.out_channels, config.decoder_channels(config.depth - 1 - i)[1], 1, 1
        )  # fmt: skip
        heads[f"decoder.seg_layers.{i}.bias"] = (config.out_channels,)
    return heads


NNUNET = Family(
    name="nnunet",
    title="nnU-Net PlainConvUNet",
    mark="encoder.stages.0.0.convs.0.conv.weight",
    keys=r"(decoder\.)?encoder\.stages\..*|decoder\.(stages|transpconvs|seg_layers)\..*",
    read=_read,
    layout=_layout,
    always={"downsample": "stride"},
    assumed={"activation": "leaky_relu", "negative_slope": 0.01, "norm_eps": 1e-5, "norm_momentum": 0.1},
    extra=r"decoder\.seg_layers\.\d+\.(weight|bias)",
    twins=_twins,
    unused=_unused,
)
