"""MONAI's BasicUNet with ``spatial_dims=2``, upsampling by ``"deconv"`` or ``"nontrainable"``."""

from __future__ import annotations

from typing import Any

from ..config import UNetConfig
from ..origin import Layout, Level, Unit
from .family import Family, Shapes, count, norm_at, units

_CONVS = ("conv_0.conv", "conv_0.adn.N"), ("conv_1.conv", "conv_1.adn.N")


def _read(shapes: Shapes) -> dict[str, Any]:
    depth = count(shapes, "down_{}.convs.conv_0.conv", 1)
    return {
        "features": (1,) * (depth + 1),
        "norm": norm_at(shapes, "conv_0.conv_0.adn.N"),
        "upsample": "transpose" if f"upcat_{depth}.upsample.deconv.weight" in shapes else "bilinear_conv",
    }


def _layout(config: UNetConfig) -> Layout:
    levels = range(1, config.depth + 1)
    up = "deconv" if config.upsample == "transpose" else "preconv"
    return Layout(
        encoder=(units("conv_0.{}", *_CONVS), *(units(f"down_{i}.convs.{{}}", *_CONVS) for i in levels)),
        decoder=tuple(
            Level(Unit(f"upcat_{i}.upsample.{up}", ""), units(f"upcat_{i}.convs.{{}}", *_CONVS))
            for i in reversed(levels)
        ),
        head="final_conv",
    )


MONAI = Family(
    name="monai",
    title="MONAI BasicUNet",
    mark="conv_0.conv_0.conv.weight",
    keys=r"(conv_0\.conv_|down_\d+\.convs|upcat_\d+\.|final_conv\.).*",
    read=_read,
    layout=_layout,
    always={"concat": "skip_first", "match": "replicate_pad", "align_corners": True},
    assumed={"activation": "leaky_relu", "negative_slope": 0.1, "norm_eps": 1e-5, "norm_momentum": 0.1},
)
