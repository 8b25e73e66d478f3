"""milesial/Pytorch-UNet: now without convolution biases, before December 2021 with them.

The latter with bilinear upsampling is also ``pytorch_unet`` of torchbench. Released files have an
entry ``mask_values``.
"""

from __future__ import annotations

from typing import Any

from ..config import UNetConfig
from ..origin import Layout, Level, Unit
from .family import Family, Shapes, count, norm_at, units

_CONVS = (0, 1), (3, 4)


def _read(shapes: Shapes) -> dict[str, Any]:
    return {
        "features": (1,) * (count(shapes, "down{}.maxpool_conv.1.double_conv.0", 1) + 1),
        "norm": norm_at(shapes, "inc.double_conv.1"),
        "upsample": "transpose" if "up1.up.weight" in shapes else "bilinear",
    }


def _layout(config: UNetConfig) -> Layout:
    levels = range(1, config.depth + 1)
    return Layout(
        encoder=(
            units("inc.double_conv.{}", *_CONVS),
            *(units(f"down{i}.maxpool_conv.1.double_conv.{{}}", *_CONVS) for i in levels),
        ),
        decoder=tuple(Level(Unit(f"up{i}.up", ""), units(f"up{i}.conv.double_conv.{{}}", *_CONVS)) for i in levels),
        head="outc.conv",
    )


MILESIAL = Family(
    name="milesial",
    title="milesial Pytorch-UNet",
    mark="inc.double_conv.0.weight",
    keys=r"(inc|outc|down\d+|up\d+)\..*",
    read=_read,
    layout=_layout,
    always={"concat": "skip_first", "align_corners": True},
    extra=r"mask_values",
)
