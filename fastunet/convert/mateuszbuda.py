"""mateuszbuda/brain-segmentation-pytorch, also on torch.hub: probabilities out."""

from __future__ import annotations

from typing import Any

from ..config import UNetConfig
from ..origin import Layout, Level, Unit
from .family import Family, Shapes, count, norm_at, units


def _convs(module: str, name: str) -> tuple[Unit, ...]:
    return units(f"{module}.{name}{{}}", ("conv1", "norm1"), ("conv2", "norm2"))


def _read(shapes: Shapes) -> dict[str, Any]:
    depth = count(shapes, "encoder{0}.enc{0}conv1", 1)
    return {
        "features": (1,) * (depth + 1),
        "norm": norm_at(shapes, "encoder1.enc1norm1"),
        "upsample": "transpose",
    }


def _layout(config: UNetConfig) -> Layout:
    levels = range(1, config.depth + 1)
    return Layout(
        encoder=(*(_convs(f"encoder{i}", f"enc{i}") for i in levels), _convs("bottleneck", "bottleneck")),
        decoder=tuple(Level(Unit(f"upconv{i}", ""), _convs(f"decoder{i}", f"dec{i}")) for i in reversed(levels)),
        head="conv",
    )


MATEUSZBUDA = Family(
    name="mateuszbuda",
    title="mateuszbuda brain-segmentation-pytorch",
    mark="encoder1.enc1conv1.weight",
    keys=r"(encoder\d+\.enc|decoder\d+\.dec|bottleneck\.bottleneck|upconv\d+\.|conv\.).*",
    read=_read,
    layout=_layout,
    always={"final_activation": "sigmoid"},
)
