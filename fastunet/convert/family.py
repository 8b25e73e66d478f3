"""What a family of U-Nets is here: how its checkpoints are recognised, read, and written again.

A family is described as data: a key that gives it away, what its code always does, and two short
functions, one that reads from the keys what of a :class:`fastunet.UNetConfig` they tell, and one
that says what its modules are called in a network of that configuration. Everything else (widths
from shapes, the map of keys both ways, the checks) is the same for all and stands below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import UNetConfig
from ..origin import Layout, Unit
from ..reference import UNet

Shapes = Mapping[str, tuple[int, ...]]


class Misfit(ValueError):
    """A key, shape or setting that does not fit a family; the message names it."""


class Mistold(ValueError):
    """An option that the caller told and may not, or of a value that no network has; the message names it."""


@dataclass(frozen=True)
class Family:
    """A kind of U-Net met in the wild.

    Attributes:
        name: what the user calls it by.
        title: the project or class it comes from.
        mark: a key that its checkpoints have and no other's.
        keys: a regular expression that all its keys match.
        read: from shapes, the options of UNetConfig that keys tell, and ``features``, of which only
            the number counts.
        layout: module paths in a network of a configuration.
        always: options that its code fixes and no argument of its constructor changes.
        assumed: options that its constructor sets and keys do not tell, with its defaults.
        extra: a regular expression of keys that are kept for the way back and not used.
        twins: other paths under which the module at a path appears once more.
        unused: for the configuration, what a fresh network has beside what is converted, as zeros.
        shows_no_norm: whether keys tell a network without norms from one whose norms have no
            parameters: the layers are numbered, and a norm takes a number.
        find: for names that follow no rule: the layout, from the shapes.
    """

    name: str
    title: str
    mark: str
    keys: str
    read: Callable[[Shapes], dict[str, Any]]
    layout: Callable[[UNetConfig], Layout]
    always: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    extra: str = r"(?!)"
    twins: Callable[[str], tuple[str, ...]] = lambda path: ()
    unused: Callable[[UNetConfig], dict[str, tuple[int, ...]]] = lambda config: {}
    shows_no_norm: bool = False
    find: Callable[[Shapes], Layout] | None = None


def norm_at(shapes: Shapes, path: str) -> str | None:
    """Which norm has its parameters at ``path``. "instance" may as well be group norm, or batch norm without
    statistics, and None one without parameters: :attr:`Origin.assumed` lists them.
    """
    if f"{path}.weight" not in shapes:
        return None
    return "batch" if f"{path}.running_mean" in shapes else "instance"


def count(shapes: Shapes, path: str, start: int = 0) -> int:
    """How many of ``path`` formatted with start, start + 1, ... have a weight."""
    number = 0
    while f"{path.format(start + number)}.weight" in shapes:
        number += 1
    return number


def units(path: str, *places: tuple[object, object]) -> tuple[Unit, ...]:
    """``units("a.{}", (0, 1))`` is a convolution at ``a.0`` and its norm at ``a.1``."""
    return tuple(Unit(path.format(conv), path.format(norm)) for conv, norm in places)


def configure(layout: Layout, shapes: Shapes, options: dict[str, Any]) -> UNetConfig:
    """The configuration of a checkpoint: ``options`` as they are, everything that shapes tell from them."""

    def shape(path: str, dims: int = 4) -> tuple[int, ...]:
        found = shapes.get(f"{path}.weight")
        if found is None:
            raise Misfit(f"key '{path}.weight' is missing")
        if len(found) != dims:
            raise Misfit(f"key '{path}.weight' has shape {found}, expected {dims} dimensions")
        return found

    encoder, decoder = layout.encoder, layout.decoder[::-1]  # both from full resolution
    features = tuple(shape(level[-1].conv)[0] for level in encoder)
    pairs = tuple((shape(level.units[0].conv)[0], shape(level.units[-1].conv)[0]) for level in decoder)
    upsample = options.get("upsample", "bilinear")
    axis = 1 if upsample == "transpose" else 0  # of the weight, on which the channels out are
    learned = tuple(shape(level.up.conv)[axis] if f"{level.up.conv}.weight" in shapes else None for level in decoder)
    convs = tuple(map(len, encoder)), tuple(len(level.units) for level in decoder)
    return UNetConfig(
        **{
            **options,
            "in_channels": shape(encoder[0][0].conv)[1],
            "out_channels": shape(layout.head)[0],
            "features": features,
            "decoder_features": None if pairs == tuple((n, n) for n in features[:-1]) else pairs,
            "up_features": None if upsample in ("bilinear", "nearest") or learned == features[:-1] else learned,
            "encoder_convs": None if set(convs[0]) == {2} else convs[0],
            "decoder_convs": None if set(convs[1]) <= {2} else convs[1],
            "conv_bias": f"{encoder[0][0].conv}.bias" in shapes,
        }
    )


def paths(config: UNetConfig, layout: Layout) -> Iterator[tuple[str, str]]:
    """(path in FastUNet, path in the family) of every module with parameters."""
    step = 2 if config.norm is None else 3
    behind = 1 if config.order == "conv_norm_act" else 2  # places from a convolution to its norm

    def stage(ours: str, theirs: tuple[Unit, ...], first: int = 0) -> Iterator[tuple[str, str]]:
        for index, unit in enumerate(theirs):
            place = first + index * step
            yield f"{ours}.{place}", unit.conv
            if config.norm is not None:
                yield f"{ours}.{place + behind}", unit.norm

    for level, theirs in enumerate(layout.encoder):
        last = level == config.depth
        yield from stage("bottleneck.net" if last else f"downs.{level}.conv.net", theirs)
    for index, theirs in enumerate(layout.decoder):
        kind = config.upsampling(config.depth - 1 - index)
        if kind == "transpose":
            yield f"ups.{index}.up", theirs.up.conv
        elif kind == "bilinear_conv":
            yield f"ups.{index}.up.1", theirs.up.conv
        elif kind == "nearest_conv":
            yield from stage(f"ups.{index}.up", (theirs.up,), first=1)
        yield from stage(f"ups.{index}.conv.net", theirs.units)
    yield "head", layout.head


def empty(config: UNetConfig) -> UNet:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return UNet.from_config(config)


def key_map(config: UNetConfig, layout: Layout) -> dict[str, str]:
    """FastUNet's state_dict keys and the family's for the same tensors, in FastUNet's order."""
    modules = dict(paths(config, layout))
    keys = {}
    for key in empty(config).state_dict():
        module, _, name = key.rpartition(".")
        if module not in modules:
            raise Misfit(f"it has no place for layer {module!r}")
        keys[key] = f"{modules[module]}.{name}"
    return keys


def check_shapes(config: UNetConfig, keys: Mapping[str, str], shapes: Shapes) -> None:
    """Raise for the first key that is missing or of another shape than the configuration wants."""
    for ours, tensor in empty(config).state_dict().items():
        theirs = keys[ours]
        if theirs not in shapes:
            raise Misfit(f"key {theirs!r} is missing")
        if shapes[theirs] != tuple(tensor.shape):
            raise Misfit(f"key {theirs!r} has shape {shapes[theirs]}, expected {tuple(tensor.shape)}")


def to_theirs(family: Family, layout: Layout, config: UNetConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict with the family's keys; twins are the same tensors."""
    result: dict[str, Tensor] = {}
    for ours, theirs in key_map(config, layout).items():
        path, _, name = theirs.rpartition(".")
        for key in (theirs, *(f"{twin}.{name}" for twin in family.twins(path))):
            result[key] = state[ours]
    return result


def differences(config: UNetConfig, other: UNetConfig) -> Iterator[str]:
    """Options in which two configurations differ and that matter to what is computed."""
    moot = {"negative_slope"} if config.activation == other.activation == "relu" else set()
    if not config.upsample.startswith("bilinear"):
        moot.add("align_corners")
    if config.norm is None:
        moot |= {"order", "norm_eps", "norm_momentum"}
    if config.norm == "instance":
        moot.add("norm_momentum")
    for option in dataclasses.fields(config):
        mine, theirs = getattr(config, option.name), getattr(other, option.name)
        if option.name not in moot and mine != theirs:
            yield option.name
