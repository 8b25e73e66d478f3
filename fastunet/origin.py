"""Where a converted network comes from: enough to say so, and to go back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from .config import UNetConfig

_KEY = "fastunet_origin"


class Unit(NamedTuple):
    """Paths of a 3x3 convolution and its norm; the latter names nothing where there is none."""

    conv: str
    norm: str


class Level(NamedTuple):
    """A decoder level: the learned upsampling, if any (``norm`` of one with a norm), and its convolutions."""

    up: Unit
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class Layout:
    """A family's module paths: encoder levels from full resolution to the bottleneck, decoder levels back up."""

    encoder: tuple[tuple[Unit, ...], ...]
    decoder: tuple[Level, ...]
    head: str


@dataclass(frozen=True)
class Origin:
    """What :func:`fastunet.convert` recognised; ``str()`` says it.

    Attributes:
        family: its name, as :func:`fastunet.convert.export` takes it. title: in words.
        config: of the network as it was converted.
        layout: what its modules are called in the family.
        assumed: options that nothing told, as the family documents them.
        remarks: on what was left out.
        extra: entries without a place in a FastUNet, which export gives back.
    """

    PREFIX: ClassVar[str] = "origin:"  # of the extra tensors' names in a file of ours

    family: str
    title: str
    config: UNetConfig
    layout: Layout
    assumed: dict[str, Any]
    remarks: tuple[str, ...]
    extra: dict[str, Any]

    def __str__(self) -> str:
        text = self.title
        if self.assumed:
            options = ", ".join(f"{name}={value!r}" for name, value in self.assumed.items())
            text += f"; assumed, as keys and shapes do not tell: {options}"
        return "; ".join([text, *self.remarks])

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(tensors, metadata) of a safetensors file."""
        tensors = {f"{self.PREFIX}{key}": value for key, value in self.extra.items() if isinstance(value, Tensor)}
        entries = {
            "family": self.family,
            "title": self.title,
            "config": self.config.to_json(),
            "layout": [self.layout.encoder, self.layout.decoder, self.layout.head],
            "assumed": self.assumed,
            "remarks": self.remarks,
            "extra": {key: value for key, value in self.extra.items() if not isinstance(value, Tensor)},
        }
        return tensors, {_KEY: json.dumps(entries)}

    @classmethod
    def from_file(cls, metadata: Mapping[str, str], entries: Mapping[str, Any]) -> Origin | None:
        """What :meth:`to_file` wrote; None where a file holds none, or none that can be read."""
        try:
            found = json.loads(metadata[_KEY])
            encoder, decoder, head = found["layout"]
            layout = Layout(
                tuple(tuple(Unit(*unit) for unit in level) for level in encoder),
                tuple(Level(Unit(*up), tuple(Unit(*unit) for unit in units)) for up, units in decoder),
                head,
            )
            tensors = {
                key.removeprefix(cls.PREFIX): value for key, value in entries.items() if key.startswith(cls.PREFIX)
            }
            return cls(
                found["family"],
                found["title"],
                UNetConfig.from_json(found["config"]),
                layout,
                found["assumed"],
                tuple(found["remarks"]),
                {**found["extra"], **tensors},
            )
        except (KeyError, TypeError, ValueError):
            return None
