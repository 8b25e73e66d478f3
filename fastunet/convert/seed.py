"""The tutorial's own blocks, ``DoubleConv``, ``Down`` and ``Up``, assembled by whom they were given to.

The blocks have a form, ``net.0`` and ``net.2``, but the network's author chose their names. What
follows what is told by the channels: each level of the encoder takes what the one before gives, and
each of the decoder takes that and a skip.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..config import UNetConfig
from ..origin import Layout, Level, Unit
from .family import Family, Misfit, Shapes

_FIRST = re.compile(r"(?:(.*)\.)?net\.0\.weight")
_NOWHERE = Unit("", "")


def _find(shapes: Shapes) -> Layout:
    blocks = [match[1] or "" for match in map(_FIRST.fullmatch, shapes) if match]
    heads = [key.removesuffix(".weight") for key in shapes if key.endswith(".weight") and shapes[key][2:] == (1, 1)]
    if len(heads) != 1:
        raise Misfit(f"expected one 1x1 convolution, the head, found {len(heads)}: {', '.join(heads) or 'none'}")
    if len(blocks) < 3 or len(blocks) % 2 == 0:
        raise Misfit(f"expected an odd number of double convolutions, from 3 on, found {len(blocks)}")
    bare = [path for path in blocks if not path.endswith("conv")]
    if len(bare) > 1:
        raise Misfit(f"expected one double convolution outside of Down and Up, found {', '.join(bare)}")
    half = len(blocks) // 2
    bottom = bare[0] if bare else blocks[half]
    others = [path for path in blocks if path != bottom]
    down, up = [*others[:half], bottom], others[half:]
    breaks = {}
    for order in (tuple(up), tuple(up[::-1])):  # as they were registered, or from full resolution
        place, wrong = _first_break(shapes, down, order)
        if not wrong:
            return Layout(
                encoder=tuple(_convs(path) for path in down),
                decoder=tuple(Level(_NOWHERE, _convs(path)) for path in order),
                head=heads[0],
            )
        breaks[place] = wrong
    raise Misfit(breaks[max(breaks)])  # of the order that goes farther


def _convs(path: str) -> tuple[Unit, ...]:
    net = f"{path}.net" if path else "net"
    return Unit(f"{net}.0", ""), Unit(f"{net}.2", "")


def _first_break(shapes: Shapes, down: Sequence[str], up: Sequence[str]) -> tuple[int, str]:
    """(place, what is wrong) of the first block that does not take what comes to it; "" where all do."""
    skips: list[int] = []
    arriving: int | None = None
    for place, path in enumerate([*down, *up]):
        first, last = (shapes.get(f"{unit.conv}.weight", ()) for unit in _convs(path))
        if len(first) != 4 or len(last) != 4:
            return place, f"key '{_convs(path)[1].conv}.weight' has shape {last}, expected that of a 3x3 convolution"
        if arriving is not None:
            expected = arriving + (skips.pop() if place >= len(down) else 0)
            if first[1] != expected:
                return (
                    place,
                    f"key '{_convs(path)[0].conv}.weight' has shape {first}, expected {expected} input channels",
                )
        arriving = last[0]
        if place < len(down) - 1:
            skips.append(arriving)
    return 0, ""


def _read(shapes: Shapes) -> dict[str, Any]:
    return {}


def _layout(config: UNetConfig) -> Layout:
    """FastUNet's own names, which whoever has none of their own may take."""
    return Layout(
        encoder=(*(_convs(f"downs.{i}.conv") for i in range(config.depth)), _convs("bottleneck")),
        decoder=tuple(Level(_NOWHERE, _convs(f"ups.{i}.conv")) for i in range(config.depth)),
        head="head",
    )


SEED = Family(
    name="seed",
    title="the tutorial's DoubleConv, Down and Up",
    mark=r"(.*\.)?net\.0\.weight",
    keys=r"(.*\.)?(net\.[02]|head)\.(weight|bias)",
    read=_read,
    layout=_layout,
    always={"norm": None},
    assumed={"upsample": "bilinear", "align_corners": True},
    shows_no_norm=True,
    find=_find,
)
