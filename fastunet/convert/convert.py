"""Recognise a network, build the FastUNet of the same function, and give its weights back."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import CONFIG_KEY, WeightsError, check, ours, read
from ..config import UNetConfig
from ..model import FastUNet
from ..origin import Layout, Origin
from ..reference import UNet
from .family import Family, Misfit, Mistold, Shapes, check_shapes, configure, differences, key_map, to_theirs
from .jvanvugt import JVANVUGT
from .leejunhyun import LEEJUNHYUN
from .mateuszbuda import MATEUSZBUDA
from .milesial import MILESIAL
from .monai import MONAI
from .nnunet import NNUNET
from .seed import SEED
from .settings import settings

#: By name. The seed's comes last: its blocks are told by the ends of their keys alone.
FAMILIES: dict[str, Family] = {
    family.name: family for family in (MILESIAL, MATEUSZBUDA, JVANVUGT, LEEJUNHYUN, MONAI, NNUNET, SEED)
}
_ENTRIES = ("network_weights", "state_dict", "model_state_dict", "model")  # of checkpoints, with weights inside
_WRAPPERS = ("module.", "_orig_mod.")
# What its code fixes in most families, and keys do not tell: what may be said of a network whose code was changed.
_DEFAULTS: dict[str, Any] = {"activation": "relu", "norm_eps": 1e-5, "norm_momentum": 0.1}

log = logging.getLogger("fastunet.convert")


class _Convert:
    """:func:`fastunet.convert`, with :func:`fastunet.convert.export` and the families on it."""

    FAMILIES = FAMILIES

    def __call__(self, x: nn.Module | Mapping[str, Any] | str | os.PathLike[str], /, **told: Any) -> FastUNet:
        """Take a U-Net that is there already: a FastUNet of the same function and weights.

        The network is recognised by its keys, shapes and submodules; nothing is run. What was
        recognised is the result's ``origin``, and is logged; ``str(model.origin)`` says it.

        Args:
            x: a network, its state_dict, or the path of a file with one (safetensors, or .pt and
                .pth, which are read with ``weights_only=True``). ``module.`` and ``_orig_mod.``
                before keys are taken off; a checkpoint's entry with the weights is found.
            told: options of :class:`fastunet.UNetConfig` that a state_dict does not tell, in place
                of those that the family documents as its defaults, e.g. ``padding="same"``. A module
                and a FastUNet's file tell theirs; then none may be given.

        Returns:
            A model with copies of the weights, of their dtype and device. Of a module it has the
            train or eval mode and the frozen parameters; of a state_dict or file it is in eval mode.

        Raises:
            WeightsError: (a ValueError) not recognised: lists the families, the nearest one, and
                the first key, shape or submodule that does not fit. Or a file that cannot be read,
                or an option that is not to be told.
        """
        if isinstance(x, nn.Module):
            return _from_module(x, told)
        if isinstance(x, Mapping):
            return _from_entries(x, "x", told).eval()
        if not isinstance(x, (str, os.PathLike)):
            raise WeightsError(f"x: expected an nn.Module, a state_dict or a path, got {type(x).__name__}")
        metadata, entries = read(x)
        if CONFIG_KEY in metadata:
            _nothing_told(told, f"{x}, which holds its configuration")
            return _own(metadata, entries, str(x)).eval()
        return _from_entries(entries, str(x), told).eval()

    @staticmethod
    def export(model: UNet, family: str) -> dict[str, Any]:
        """The model's state_dict with the keys of ``family``, to be loaded into its own module.

        What a conversion left aside (further heads, ``mask_values``) is there again; tensors are the
        model's own, as in ``model.state_dict()``. Without a conversion before, what the family's
        module holds beside that is zeros, and options that its constructor takes and keys do not
        tell (``padding`` of jvanvugt's, slopes and ``eps`` of MONAI's) are for the caller to give it.

        Args:
            family: a key of ``fastunet.convert.FAMILIES``.

        Raises:
            ValueError: no such family, or the model is not one of it; names the first option that
                its code cannot have.
        """
        if not isinstance(model, UNet):
            raise ValueError(f"model: expected a FastUNet, got {type(model).__name__}")
        if family not in FAMILIES:
            raise ValueError(f"family: expected one of {', '.join(map(repr, FAMILIES))}, got {family!r}")
        return _export(model, FAMILIES[family])


convert = _Convert()
export = convert.export


def _from_module(x: nn.Module, told: Mapping[str, Any]) -> FastUNet:
    while True:  # wrappers in wrappers
        inner = getattr(x, "_orig_mod", None)
        if isinstance(x, (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)):
            inner = x.module
        if not isinstance(inner, nn.Module):
            break
        x = inner
    if isinstance(x, UNet):
        _nothing_told(told, f"x ({type(x).__name__}), which tells them itself")
        model = _build(x.config, x.state_dict(), {})
        model.origin = getattr(x, "origin", None)
        keys = {name: name for name in model.state_dict()}
    else:
        model = _from_entries(x.state_dict(), f"x ({type(x).__name__})", told, x)
        assert model.origin is not None
        keys = key_map(model.config, model.origin.layout)
    theirs = dict(x.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(theirs[keys[name]].requires_grad)
    return model.train(x.training)


def _nothing_told(told: Mapping[str, Any], of: str) -> None:
    if told:
        raise WeightsError(f"option {next(iter(told))!r} is not for the caller to tell of {of}")


def _from_entries(
    entries: Mapping[str, Any], source: str, told: Mapping[str, Any], module: nn.Module | None = None
) -> FastUNet:
    entries = _unwrapped(entries, source)
    shapes: Shapes = {key: tuple(value.shape) for key, value in entries.items() if isinstance(value, Tensor)}
    if not shapes:
        key, value = next(iter(entries.items()), ("", None))
        got = f"{key!r} is {type(value).__name__}" if entries else "got an empty one"
        raise WeightsError(f"{source}: expected a state_dict of tensors, {got}")
    family = next((f for f in FAMILIES.values() if any(re.fullmatch(f.mark, key) for key in shapes)), None)
    if family is None:
        raise WeightsError(f"{source}: {_unrecognised(shapes)}")
    try:
        config, layout, assumed, remarks = _recognise(family, shapes, module, told)
        keys = key_map(config, layout)
        check_shapes(config, keys, shapes)
        extra = _left_over(family, config, layout, keys, entries)
    except Mistold as error:
        raise WeightsError(f"{source}, as {family.title}: {error}") from None
    except ValueError as error:
        raise WeightsError(f"{source}: {_families()}; nearest: {family.title}, but {error}") from None
    model = _build(config, entries, keys)
    model.origin = Origin(family.name, family.title, config, layout, assumed, tuple(remarks), extra)
    (log.warning if assumed or remarks else log.info)("%s: recognised as %s", source, model.origin)
    return model


def _recognise(
    family: Family,
    shapes: Shapes,
    module: nn.Module | None,
    told: Mapping[str, Any],
    layout: Layout | None = None,
) -> tuple[UNetConfig, Layout, dict[str, Any], list[str]]:
    """(configuration, module paths, options that were assumed, remarks); ``layout``: the paths, if they are known."""
    documented = {**_DEFAULTS, **family.assumed}
    options = {**documented, **family.always, **family.read(shapes)}
    if options.get("padding") == "valid" and "match" not in family.always:
        raise Misfit("convolutions: expected zero-padded ones")
    if layout is None and family.find is not None:
        layout = family.find(shapes)
    elif layout is None:
        # Widths and numbers of channels do not count for names.
        layout = family.layout(UNetConfig(**{**options, "padding": "same"}))
    config = configure(layout, shapes, options)
    check_shapes(config, key_map(config, layout), shapes)
    untold = set(documented) | ({"align_corners"} & set(family.always))
    if config.norm == "instance" or (config.norm is None and not family.shows_no_norm):
        untold.add("norm")
    for name in told:
        if name not in untold or module is not None:
            may = ", ".join(sorted(untold)) if module is None else "none of a module, which tells them itself"
            raise Mistold(f"option {name!r} is not for the caller to tell; may be told: {may}")
    found, remarks = settings(module, layout, config) if module is not None else (dict(told), [])
    if "match" not in family.always and found.get("padding") == "valid":
        raise Misfit("convolutions: expected zero-padded ones")
    try:
        config = dataclasses.replace(config, **found)
    except ValueError as error:
        raise Mistold(error) if told else error from None
    # Only options that matter, as far as nobody told.
    matter = set(differences(config, _other_in_all(config, untold)))
    if config.activation == "relu":
        matter.discard("negative_slope")
    assumed = {name: getattr(config, name) for name in sorted(untold & matter) if name not in found}
    return config, layout, assumed, remarks


def _other_in_all(config: UNetConfig, names: set[str]) -> UNetConfig:
    """A configuration that differs in each of some options, so that :func:`differences` says which matter."""
    others: dict[str, Any] = {
        "align_corners": not config.align_corners,
        "norm_eps": config.norm_eps + 1,
        "norm_momentum": config.norm_momentum + 1,
        "activation": "relu" if config.activation == "leaky_relu" else "leaky_relu",
        "negative_slope": config.negative_slope / 2 + 0.1,
        "norm": "batch" if config.norm == "instance" else "instance",
        "padding": "same" if config.padding == "valid" else "valid",
        "upsample": "nearest" if config.upsample == "bilinear" else config.upsample,
    }
    return dataclasses.replace(config, **{name: others[name] for name in names})


def _left_over(
    family: Family, config: UNetConfig, layout: Layout, keys: Mapping[str, str], entries: Mapping[str, Any]
) -> dict[str, Any]:
    """Entries beside those that are converted: those to keep; raise for any that should not be there."""
    twins: dict[str, str] = {}
    for theirs in keys.values():
        path, _, name = theirs.rpartition(".")
        twins |= {f"{twin}.{name}": theirs for twin in family.twins(path)}
    used, extra = set(keys.values()), {}
    for twin in twins:
        if twin not in entries:
            raise Misfit(f"key {twin!r} is missing")
    for key, value in entries.items():
        if key in used:
            continue
        if key in twins:
            if not isinstance(value, Tensor) or not torch.equal(value, entries[twins[key]]):
                raise Misfit(f"key {key!r} holds other values than {twins[key]!r}")
        elif re.fullmatch(family.extra, key):
            extra[key] = value.detach().clone() if isinstance(value, Tensor) else value
        else:
            raise Misfit(f"key {key!r} is no part of it")
    return extra


def _build(config: UNetConfig, state: Mapping[str, Tensor], keys: Mapping[str, str]) -> FastUNet:
    """The FastUNet of a configuration with copies of tensors, as they are."""
    with torch.device("meta"):
        model = FastUNet.from_config(config)
    copies = {name: state[keys.get(name, name)].detach().clone() for name in model.state_dict()}
    model.load_state_dict(copies, assign=True)
    return model


def _own(metadata: Mapping[str, str], entries: Mapping[str, Any], source: str) -> FastUNet:
    """A file that FastUNet wrote."""
    config, state, origin = ours(metadata, entries, source)
    assert config is not None
    check(config, state, source)
    model = _build(config, state, {})
    model.origin = origin
    return model


def _unwrapped(entries: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The state_dict inside a checkpoint, without wrappers' prefixes."""
    inside = next((name for name in _ENTRIES if isinstance(entries.get(name), Mapping)), None)
    if inside is not None:
        entries = entries[inside]
    for key, value in entries.items():
        if not isinstance(key, str):
            raise WeightsError(f"{source}: expected a state_dict of tensors, found the key {key!r}")
        if isinstance(value, Mapping):
            names = " or ".join(map(repr, _ENTRIES))
            raise WeightsError(
                f"{source}: expected a state_dict of tensors, by itself or as the entry {names}, "
                f"{key!r} is {type(value).__name__}"
            )
    while True:
        # AveragedModel counts its updates beside the prefix.
        tensors = [key for key, value in entries.items() if isinstance(value, Tensor) and key != "n_averaged"]
        prefix = next((p for p in _WRAPPERS if tensors and all(key.startswith(p) for key in tensors)), None)
        if prefix is None:
            return entries
        entries = {key.removeprefix(prefix): value for key, value in entries.items() if key != "n_averaged"}


def _families() -> str:
    return "expected one of " + ", ".join(f"{name} ({family.title})" for name, family in FAMILIES.items())


def _unrecognised(shapes: Shapes) -> str:
    """Which family comes nearest, and the first key that it does not have."""

    def alike(family: Family) -> int:
        return sum(re.fullmatch(family.keys, key) is not None for key in shapes)

    nearest = max(FAMILIES.values(), key=alike)
    foreign = next((key for key in shapes if not re.fullmatch(nearest.keys, key)), None)
    if not alike(nearest):
        return f"{_families()}; nearest: none, the first key is {foreign!r}"
    lacking = f"it has no {foreign!r}" if foreign is not None else f"a key like {nearest.mark!r} is missing"
    return f"{_families()}; nearest: {nearest.title}, but {lacking}"


def _export(model: UNet, family: Family) -> dict[str, Any]:
    config, origin = model.config, getattr(model, "origin", None)
    if origin is not None and origin.family == family.name and not [*differences(config, origin.config)]:
        return {**to_theirs(family, origin.layout, config, model.state_dict()), **origin.extra}
    layout = family.layout(config)
    try:
        state = to_theirs(family, layout, config, model.state_dict())
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        theirs = _recognise(family, shapes, None, {}, layout)[0]
    except ValueError as error:
        raise ValueError(f"model: cannot be written as {family.title}: {error}") from None
    for name in differences(config, theirs):
        if name not in family.assumed:
            mine, expected = getattr(config, name), getattr(theirs, name)
            raise ValueError(f"model: expected {name}={expected!r} of {family.title}, got {mine!r}")
    like = next(model.parameters())
    return {**state, **{key: like.new_zeros(shape) for key, shape in family.unused(config).items()}}
