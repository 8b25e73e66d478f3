"""What the keys of a checkpoint do not tell, read from the submodules of a living network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..config import UNetConfig
from ..origin import Layout
from .family import Misfit

_NORMS = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}
_POOLS = (nn.AvgPool2d, nn.MaxPool2d, nn.LPPool2d)
# Submodules without children that are no activation. Pools of other kinds are refused by a message of their own.
_KNOWN = (
    *(nn.Conv2d, nn.ConvTranspose2d, *_NORMS.values(), nn.Upsample, *_POOLS),
    *(nn.modules.dropout._DropoutNd, nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict),
    nn.modules.loss._Loss,  # beside the network, as training code has it
)


def settings(network: nn.Module, layout: Layout, config: UNetConfig) -> tuple[dict[str, Any], list[str]]:
    """Options of ``config`` as the network's submodules have them, and remarks on what is left out.

    Raises:
        Misfit: a submodule does what no configuration says.
    """
    found: dict[str, Any] = {}
    units = [*(unit for level in layout.encoder for unit in level)]
    units += [unit for level in layout.decoder for unit in level.units]
    if config.upsample == "nearest_conv":
        units += [level.up for level in layout.decoder]
    found |= _of_convolutions(network, layout, config)
    found |= _of_norms(network, [unit.norm for unit in units], config)
    found |= _of_activations(network)
    found |= _of_upsampling(network, config)
    for name, module in network.named_modules():
        if isinstance(module, _POOLS):
            if not isinstance(module, nn.MaxPool2d) or _pair(module.kernel_size) != (2, 2):
                raise Misfit(f"module {name!r}: expected 2x2 max-pooling, got {module}")
            if module.ceil_mode or _pair(module.stride) != (2, 2) or _pair(module.padding) != (0, 0):
                raise Misfit(f"module {name!r}: expected 2x2 max-pooling, got {module}")
    dropouts = {m.p for m in network.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0}
    remarks = [f"dropout of p={p} is left out, which acts in train mode alone" for p in sorted(dropouts)]
    return found, remarks


def _of_convolutions(network: nn.Module, layout: Layout, config: UNetConfig) -> dict[str, Any]:
    paddings = set()
    for depth, level in enumerate([*layout.encoder, *(level.units for level in layout.decoder)]):
        for index, unit in enumerate(level):
            conv: Any = network.get_submodule(unit.conv)
            plain = isinstance(conv, nn.Conv2d) and conv.groups == 1 and conv.dilation == (1, 1)
            if not plain or conv.padding_mode != "zeros":
                raise Misfit(f"module {unit.conv!r}: expected a plain, zero-padded 3x3 convolution, got {conv}")
            strided = config.downsample == "stride" and not index and 0 < depth <= config.depth
            expected = config.stride(depth) if strided else (1, 1)
            if conv.stride != expected:
                raise Misfit(f"module {unit.conv!r}: expected a stride of {expected}, got {conv.stride}")
            paddings.add({(1, 1): "same", "same": "same", (0, 0): "valid", "valid": "valid"}.get(conv.padding, "other"))
    if len(paddings) != 1 or "other" in paddings:
        raise Misfit("convolutions: expected all to pad by 1, or none to pad")
    return {"padding": paddings.pop()}


def _of_norms(network: nn.Module, names: Iterable[str], config: UNetConfig) -> dict[str, Any]:
    norms: list[Any] = [] if config.norm is None else [(name, network.get_submodule(name)) for name in names]
    having_keys = {id(norm) for _, norm in norms}
    for name, module in network.named_modules():
        if isinstance(module, tuple(_NORMS.values())) and id(module) not in having_keys:
            raise Misfit(f"module {name!r}: expected a norm with weights (affine=True), or none, got {module}")
    if config.norm is None:
        return {"norm": None}
    for name, norm in norms:
        if not isinstance(norm, _NORMS[config.norm]):
            kinds = " or ".join(kind.__name__ for kind in _NORMS.values())
            raise Misfit(f"module {name!r}: expected {kinds}, with the usual statistics, got {norm}")
    return {
        "norm": config.norm,
        "norm_eps": _one("eps", {norm.eps for _, norm in norms}),
        "norm_momentum": _one("momentum", {norm.momentum for _, norm in norms}),
    }


def _of_activations(network: nn.Module) -> dict[str, Any]:
    kinds = set()
    for name, module in network.named_modules():
        if isinstance(module, (nn.ReLU, nn.LeakyReLU)):
            kinds.add(module.negative_slope if isinstance(module, nn.LeakyReLU) else None)
        elif type(module).__module__ == nn.modules.activation.__name__:
            raise Misfit(f"module {name!r}: expected ReLU or LeakyReLU, got {module}")
        elif not isinstance(module, _KNOWN) and next(module.children(), None) is None:
            raise Misfit(
                f"module {name!r}: expected a convolution, batch or instance norm, ReLU, LeakyReLU, max-pooling, "
                f"upsampling or dropout, got {module}"
            )
    if not kinds:
        raise Misfit("activations: expected submodules that are ReLU or LeakyReLU, found none")
    slope = _one("activation", kinds)
    return {"activation": "relu"} if slope is None else {"activation": "leaky_relu", "negative_slope": slope}


def _of_upsampling(network: nn.Module, config: UNetConfig) -> dict[str, Any]:
    kinds = set()
    for name, module in network.named_modules():
        if isinstance(module, nn.Upsample):
            if module.mode not in ("bilinear", "nearest") or _pair(module.scale_factor) != (2, 2):
                raise Misfit(f"module {name!r}: expected to double by bilinear or nearest, got {module}")
            kinds.add((module.mode, bool(module.align_corners)))
    if not kinds or config.upsample == "transpose":
        return {}
    mode, corners = _one("upsampling", kinds)
    had = "nearest" if config.upsample.startswith("nearest") else "bilinear"
    kind = config.upsample.replace(had, mode)
    if mode == "bilinear" and had == "nearest" or kind == "nearest_conv" != config.upsample:
        raise Misfit(f"upsampling: expected {had} before these convolutions, got {mode}")
    return {"upsample": kind, "align_corners": corners} if mode == "bilinear" else {"upsample": kind}


def _pair(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _one(what: str, values: set[Any]) -> Any:
    if len(values) != 1:
        raise Misfit(f"{what}: expected the same throughout, got {', '.join(sorted(map(str, values)))}")
    return values.pop()
