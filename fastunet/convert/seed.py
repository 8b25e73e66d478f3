"""The tutorial's own blocks, ``DoubleConv``, ``Down`` and ``Up``, assembled by whom they were given to.

The blocks have a form, ``net.0`` and ``net.2``, but the network's author chose their names. What
follows what is told by the channels: each level of the encoder takes what the one before gives, and
each of the decoder takes that and a skip. The order of keys says nothing, as safetensors sorts them;
where channels allow for more than one order, the network is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..config import UNetConfig
from ..origin import Layout, Level, Unit
from .family import Family, Misfit, Shapes

_FIRST = re.compile(r"(?:(.*)\.)?net\.0\.weight")
_NOWHERE = Unit("", "")
_MOST = 17  # double convolutions, of eight levels: more would only be tried in vain


def _find(shapes: Shapes) -> Layout:
    paths = [match[1] or "" for match in map(_FIRST.fullmatch, shapes) if match]
    heads = [key.removesuffix(".weight") for key in shapes if key.endswith(".weight") and shapes[key][2:] == (1, 1)]
    if len(heads) != 1:
        raise Misfit(f"expected one 1x1 convolution, the head, found {len(heads)}: {', '.join(heads) or 'none'}")
    if not 3 <= len(paths) <= _MOST or len(paths) % 2 == 0:
        raise Misfit(f"expected an odd number of double convolutions, from 3 to {_MOST}, found {len(paths)}")
    bare = [path for path in paths if not path.endswith(".conv")]
    if len(bare) > 1:
        raise Misfit(f"expected one double convolution outside of Down and Up, found {', '.join(bare)}")
    blocks = {path: _channels(shapes, path) for path in paths}
    ends: dict[int, tuple[str, int]] = {}
    orders = _orders(blocks, bare[0] if bare else None, shapes[f"{heads[0]}.weight"][1], [], ends)
    found = list(itertools.islice(orders, 2))
    if not found:
        place = max(ends)  # of the order that goes farthest
        path, coming = ends[place]
        key = f"{heads[0] if place == len(blocks) else _convs(path)[0].conv}.weight"
        raise Misfit(f"key {key!r} has shape {shapes[key]}, expected {coming} input channels")
    named = [path for path in paths if path not in bare]
    alike = [(a, b) for a, b in itertools.combinations(named, 2) if blocks[a] == blocks[b]]
    if len(found) == 2:
        alike += [(a, b) for a, b in zip(*found, strict=True) if a != b]
    if alike:
        raise Misfit(f"channels do not tell the place of {alike[0][0]!r} from that of {alike[0][1]!r}")
    half = len(paths) // 2
    return Layout(
        encoder=tuple(_convs(path) for path in found[0][: half + 1]),
        decoder=tuple(Level(_NOWHERE, _convs(path)) for path in found[0][half + 1 :]),
        head=heads[0],
    )


def _convs(path: str) -> tuple[Unit, ...]:
    net = f"{path}.net" if path else "net"
    return Unit(f"{net}.0", ""), Unit(f"{net}.2", "")


def _channels(shapes: Shapes, path: str) -> tuple[int, int]:
    """(in, out) of a double convolution."""
    first, last = (shapes.get(f"{unit.conv}.weight", ()) for unit in _convs(path))
    if len(first) != 4 or len(last) != 4:
        raise Misfit(f"key '{_convs(path)[1].conv}.weight' has shape {last}, expected that of a 3x3 convolution")
    return first[1], last[0]


def _orders(
    blocks: Mapping[str, tuple[int, int]],
    bottom: str | None,
    head: int,
    placed: list[str],
    ends: dict[int, tuple[str, int]],
) -> Iterator[list[str]]:
    """The orders from the first level down and back up in which each block takes what comes to it.

    Of blocks with the same channels only the first is tried in a place.

    Args:
        blocks: (in, out) channels of each path.
        bottom: the bottleneck's path, if it is known.
        head: channels that the head takes.
        placed: how the orders begin.
        ends: takes (path, channels that come) for each place at which an attempt ended.
    """
    place, half = len(placed), len(blocks) // 2
    coming = blocks[placed[-1]][1] if placed else None
    if place == len(blocks):
        if coming == head:
            yield placed
        else:
            ends.setdefault(place, ("", coming or 0))
        return
    if place > half:
        coming = (coming or 0) + blocks[placed[2 * half - place]][1]
    left = [path for path in blocks if path not in placed and (bottom is None or (path == bottom) == (place == half))]
    fitting = {blocks[path]: path for path in left if coming in (None, blocks[path][0])}
    if not fitting:
        ends.setdefault(place, (left[0], coming or 0))
    for path in fitting.values():
        yield from _orders(blocks, bottom, head, [*placed, path], ends)


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
