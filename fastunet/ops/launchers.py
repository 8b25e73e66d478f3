"""Which implementation serves a step of an operator, and a forward pass's launcher."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import dispatch, measured
from .common import has_factors, tf32

if TYPE_CHECKING or dispatch.has_triton():
    from .. import kernels

Shapes = tuple[tuple[int, ...], ...]

_REMEMBERED = 8192  # choices of a device: those of some 100 sizes of a network's input, with their gradients


def choose(
    op: str,
    maps: Shapes,
    weight: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    mode: str = "none",
    step: str = "forward",
    geometry: str = "",
    classes: int = 0,
    factors: bool = False,
) -> dispatch.Choice:
    """Which implementation serves a step of an operator, and why.

    Args:
        op: name of the operator; with a pool, ``"conv2d_relu_pool"``.
        maps: shape (N, C, H, W) of each source. weight: its shape.
        mode: how the first source is upsampled.
        step: of :data:`fastunet.dispatch.STEPS`.
        geometry: of :func:`fastunet.dispatch.geometry`.
        classes: of the head in the same pass, of ``"conv2d_relu_head"``; there ``"torch"`` is two operators, each
            as it is chosen.
        factors: whether the bias is (2, O): cuDNN takes such a norm in a pass of its own.
    """
    layer = op, maps, weight, dtype, mode, step, geometry, classes

    def obstacle(implementation: str) -> str | None:
        if geometry:
            return f"it serves no convolution {geometry}"
        if step == "dgrad" and implementation == "hopper":
            return kernels.hopper.why_not_dgrad(op, maps, weight, dtype, tf32=tf32())
        if step != "forward":
            return "it gives no gradient"
        if implementation != "hopper" and (op != "upsample_concat_conv2d_relu" or mode == "none"):
            return "it upsamples nothing"
        if implementation == "commuted":
            return None
        return kernels.hopper.why_not_layer(op, maps, weight, dtype, mode=mode, tf32=tf32())

    # With factors our kernels take a multiplication more.
    key, alike = (measured.layer_key(*layer, with_them) for with_them in (factors, not factors))
    choice = dispatch.choose_layer(device, dtype, key, obstacle, step, alike)
    if not classes or choice.implementation == "torch":
        return choice
    if classes > kernels.HEAD_CLASSES or weight[0] > kernels.HEAD_CHANNELS:
        return dispatch.Choice("torch", f"no tile holds {weight[0]} channels and {classes} classes")
    (n, _, h, w), out = maps[0], weight[0]
    first = choose("conv2d_relu", maps, weight, device, dtype, factors=factors)
    second = choose("conv2d_relu", ((n, out, h, w),), (classes, out, 1, 1), device, dtype)
    entries = [first.entry, second.entry]
    if choice.entry is None:
        return choice if entries[0] is None else dispatch.Choice("torch", "two passes, of which the first was measured")
    times = [entry.microseconds[entry.implementation] for entry in (choice.entry, *entries) if entry is not None]
    if len(times) == 3 and sum(times[1:]) < times[0]:
        text = "measured, in microseconds: two passes {1:.0f} + {2:.0f}, one {0:.0f}"
        return dispatch.Choice("torch", text.format(*times))
    return choice


def launcher(
    name: str,
    op: str,
    maps: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None,
    mode: str = "none",
    stride: Sequence[int] = (1, 1),
    padding: str = "same",
    classes: int = 0,
) -> Any:
    """The launcher of that name in the module that serves these tensors; None for plain torch."""
    shapes = tuple(tuple(x.shape) for x in maps)
    layer = op, shapes, tuple(weight.shape), maps[-1].device, maps[-1].dtype, mode
    choice = chosen(*layer, geometry=dispatch.geometry(stride, padding), classes=classes, factors=has_factors(bias))
    if choice.implementation == "torch":
        return None
    if choice.implementation == "commuted":
        return kernels.upconcat_conv3x3_commuted_fwd
    if choice.implementation == "hopper commuted":
        return kernels.hopper.upconcat_conv3x3_commuted_fwd
    if choice.implementation == "triton":
        stem = name == "conv_fwd" and shapes[0][1] <= kernels.STEM_CHANNELS and weight.shape[-1] == 3
        launch = kernels.stem_fwd if stem else getattr(kernels, name)
        how = geometry_options(stride, padding)
        return functools.partial(launch, **how) if how else launch
    fields = choice.entry.config if choice.entry is not None else None
    config = _offered(tuple(fields.items()), op, shapes, tuple(weight.shape), maps[-1].dtype, mode) if fields else None
    return functools.partial(getattr(kernels.hopper, name), config=config)


def chosen(
    op: str,
    maps: Shapes,
    weight: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    mode: str = "none",
    step: str = "forward",
    geometry: str = "",
    classes: int = 0,
    factors: bool = False,
) -> dispatch.Choice:
    """:func:`choose`, of a GPU once: it takes a host as long as a small layer takes a GPU."""
    layer = op, maps, weight, device, dtype, mode, step, geometry, classes, factors
    if device.type != "cuda":
        return choose(*layer)
    choices = measured.table(device).choices
    key = *layer, dispatch.asked_for(step), tf32()
    choice = choices.get(key)
    if choice is None:
        choice = choose(*layer)
        if len(choices) >= _REMEMBERED:
            choices.clear()
        choices[key] = choice
    return choice


def geometry_options(stride: Sequence[int], padding: str) -> dict[str, Any]:
    """What a portable launcher is told of a convolution that does not keep its map's size."""
    how: dict[str, Any] = {} if tuple(stride) == (1, 1) else {"stride": tuple(stride)}
    return how if padding == "same" else {**how, "pad": 0}


@functools.cache
def _offered(
    fields: tuple[tuple[str, int], ...], op: str, maps: Shapes, weight: tuple[int, ...], dtype: torch.dtype, mode: str
) -> Any:
    """The launch configuration of these fields, if this version offers it for the layer, with this Triton."""
    offered = kernels.hopper.layer_configs(op, maps, weight, dtype, mode=mode)
    return next((config for config in offered if dataclasses.asdict(config) == dict(fields)), None)
