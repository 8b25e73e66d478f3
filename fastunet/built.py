"""Is a U-Net as it was built? Operators take the parameters of its layers and pass the layers by."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from torch import nn

from .reference import DoubleConv, Down, InstanceNorm2d, UNet, Up

_NORMS = {"batch": nn.BatchNorm2d, "instance": InstanceNorm2d}


def as_built(network: UNet) -> bool:
    """Whether every layer is of the kind that ``network.config`` says: a SyncBatchNorm in a norm's place is not.

    Modules beside ``downs``, ``bottleneck``, ``ups`` and ``head`` are a subclass's own affair.
    """
    config = network.config
    unit: list[Any] = [nn.Conv2d, nn.LeakyReLU if config.activation == "leaky_relu" else nn.ReLU]
    if config.norm is not None:
        unit.insert(1 if config.order == "conv_norm_act" else 2, _NORMS[config.norm])
    slope = config.negative_slope

    def block(conv: Any) -> bool:
        return type(conv) is DoubleConv and _are(conv.net, unit, slope)

    def upsampling(up: Any) -> bool:
        if up.kind == "transpose":
            return _is(up.up, nn.ConvTranspose2d, slope)
        if type(up.up) is nn.Sequential:
            first, *others = up.up._modules.values()
            kinds = unit if up.kind == "nearest_conv" else [nn.Conv2d]
            return _doubles(first) and _are(others, kinds, slope)
        return _doubles(up.up)

    pool = nn.Identity if config.downsample == "stride" else nn.MaxPool2d
    downs: Any = network.downs._modules.values()
    ups: Any = network.ups._modules.values()
    return (
        all(type(d) is Down and block(d.conv) and _is_pool(d.pool, pool) for d in downs)
        and block(network.bottleneck)
        and all(type(up) is Up and upsampling(up) and block(up.conv) for up in ups)
        and _is(network.head, nn.Conv2d, slope)
    )


def _doubles(upsample: Any) -> bool:
    return type(upsample) is nn.Upsample and upsample.scale_factor == 2


def _are(layers: Any, kinds: list[Any], slope: float) -> bool:
    if isinstance(layers, nn.Module):
        if type(layers) is not nn.Sequential:
            return False
        layers = layers._modules.values()
    return len(layers) % len(kinds) == 0 and all(_is(layer, kind, slope) for layer, kind in zip(layers, cycle(kinds)))


def _is_shaped(conv: Any) -> bool:
    """Whether operators take its filter, stride and padding: those that networks of ours are built with."""
    if isinstance(conv, nn.ConvTranspose2d):
        return conv.stride == conv.kernel_size and conv.padding == conv.output_padding == (0, 0)
    if conv.kernel_size == (1, 1):
        return conv.stride == (1, 1) and conv.padding == (0, 0)
    return conv.kernel_size == (3, 3) and conv.padding in ((0, 0), (1, 1))


def _is_pool(pool: Any, kind: Any) -> bool:
    if type(pool) is not kind:
        return False
    return kind is nn.Identity or (pool.stride == pool.kernel_size and not (pool.padding or pool.ceil_mode))


def _is(layer: Any, kind: Any, slope: float) -> bool:
    found = type(layer)
    if found is not kind:
        if found is nn.Identity:  # a norm that was folded into its convolution
            return kind in _NORMS.values()
        if found.__bases__ != (kind,) or not hasattr(layer, "parametrizations"):
            return False
    if kind is nn.Conv2d or kind is nn.ConvTranspose2d:
        plain = layer.padding_mode == "zeros" and layer.groups == 1 and layer.dilation == (1, 1)
        return plain and _is_shaped(layer)
    if kind is InstanceNorm2d:
        return layer.running_mean is None
    return kind is not nn.LeakyReLU or layer.negative_slope == slope
