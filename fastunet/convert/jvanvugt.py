"""jvanvugt/pytorch-unet: activation before norm, skips cut to size, with or without padding."""

from __future__ import annotations

from typing import Any

from ..config import UNetConfig
from ..origin import Layout, Level, Unit
from .family import Family, Shapes, count, norm_at, units


def _read(shapes: Shapes) -> dict[str, Any]:
    # Without a norm the second convolution stands where the first norm would.
    norm = norm_at(shapes, "down_path.0.block.2") if "down_path.0.block.3.weight" in shapes else None
    return {
        "features": (1,) * count(shapes, "down_path.{}.block.0"),
        "norm": norm,
        "upsample": "transpose" if "up_path.0.up.weight" in shapes else "bilinear_conv",
    }


def _layout(config: UNetConfig) -> Layout:
    convs = ((0, 1), (2, 3)) if config.norm is None else ((0, 2), (3, 5))
    up = "up" if config.upsample == "transpose" else "up.1"
    return Layout(
        encoder=tuple(units(f"down_path.{i}.block.{{}}", *convs) for i in range(config.depth + 1)),
        decoder=tuple(
            Level(Unit(f"up_path.{i}.{up}", ""), units(f"up_path.{i}.conv_block.block.{{}}", *convs))
            for i in range(config.depth)
        ),
        head="last",
    )


JVANVUGT = Family(
    name="jvanvugt",
    title="jvanvugt pytorch-unet",
    mark="down_path.0.block.0.weight",
    keys=r"(down_path|up_path)\.\d+\..*|last\..*",
    read=_read,
    layout=_layout,
    always={"order": "conv_act_norm", "match": "center_crop", "align_corners": False},
    assumed={"padding": "valid"},
    shows_no_norm=True,
)
