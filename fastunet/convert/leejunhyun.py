"""LeeJunHyun/Image_Segmentation, its ``U_Net``: nearest upsampling, then a convolution with norm and ReLU."""

from __future__ import annotations

from typing import Any

from ..config import UNetConfig
from ..origin import Layout, Level, Unit
from .family import Family, Shapes, count, norm_at, units

_CONVS = (0, 1), (3, 4)


def _read(shapes: Shapes) -> dict[str, Any]:
    return {
        "features": (1,) * count(shapes, "Conv{}.conv.0", 1),
        "norm": norm_at(shapes, "Conv1.conv.1"),
        "upsample": "nearest_conv",
    }


def _layout(config: UNetConfig) -> Layout:
    levels = range(1, config.depth + 2)
    return Layout(
        encoder=tuple(units(f"Conv{i}.conv.{{}}", *_CONVS) for i in levels),
        decoder=tuple(
            Level(Unit(f"Up{i}.up.1", f"Up{i}.up.2"), units(f"Up_conv{i}.conv.{{}}", *_CONVS))
            for i in reversed(levels[1:])
        ),
        head="Conv_1x1",
    )


LEEJUNHYUN = Family(
    name="leejunhyun",
    title="LeeJunHyun Image_Segmentation U_Net",
    mark="Conv1.conv.0.weight",
    keys=r"(Conv\d+\.conv|Up\d+\.up|Up_conv\d+\.conv|Conv_1x1)\..*",
    read=_read,
    layout=_layout,
    always={"concat": "skip_first"},
)
