"""Every launch configuration that may be chosen, not only the one that is, against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels, reference
from ..config import UNetConfig
from ..kernels import tuning
from ..trace import Layer, trace
from .measures import distance
from .repeatability import poisoned_memory, same
from .report import Comparison
from .rule import Parity, compare, tf32_convolutions, truncating_stages

Config = tuning.ConvConfig | kernels.hopper.HopperConfig


@dataclass(frozen=True)
class Launch:
    """One layer's kernel on tensors of its shapes, and what it must equal.

    Attributes:
        launcher: of :mod:`fastunet.kernels`; takes the tensors and, by name, the options.
        function: of :mod:`fastunet.reference`; takes the same tensors.
        configs: what the launcher may choose among on a device, by its capability.
        hopper: the configurations of its Hopper sibling; empty where that cannot serve the layer.
    """

    layer: Layer
    launcher: Callable[..., Any]
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    tensors: tuple[Tensor, ...]
    options: dict[str, Any]
    configs: Callable[[tuple[int, int]], tuple[tuning.ConvConfig, ...]]
    hopper: tuple[kernels.hopper.HopperConfig, ...]

    def run(self, config: Config | None = None) -> Any:
        """Launch; without ``config`` the launcher chooses."""
        launcher = self.launcher
        if isinstance(config, kernels.hopper.HopperConfig):
            launcher = getattr(kernels.hopper, launcher.__name__)
        return launcher(*self.tensors, **self.options, config=config)


def launches(
    config: UNetConfig, size: tuple[int, int, int], make: Callable[..., Tensor], *, tf32: bool = True
) -> Iterator[Launch]:
    """The launches of a network's forward pass, in order; layers that no kernel serves are left out.

    Args:
        size: (batch, height, width).
        make: ``make(*shape, fan_in=1)`` gives a tensor; all are of one dtype and device.
        tf32: round float32 operands to tf32.
    """
    batch, height, width = size
    for layer in trace(config, height, width, batch):
        if layer.unserved:
            continue
        mode = layer.mode
        corners = mode == "bilinear" and config.align_corners
        inputs, out = tuple(make(*shape) for shape in layer.in_shapes), layer.out_shape[1]
        channels = tuple(x.shape[1] for x in inputs)
        c, (h, w) = sum(channels), layer.out_shape[2:]
        precise = inputs[0].dtype == torch.float32 and not tf32
        slope = 1.0 if layer.activation is None else config.slope
        options: dict[str, Any] = {"tf32": tf32}
        source, interpolating = (h, w), False
        if layer.op == "conv_transpose2x2":
            weight, bias = make(c, out, 2, 2, fan_in=c), make(out)
            launcher, function = kernels.conv_transpose2x2_fwd, reference.conv_transpose2x2
            source = inputs[0].shape[2:]
        else:
            side = layer.weight_shape[-1]
            weight, bias = make(out, c, side, side, fan_in=side * side * c), make(out)
            options["slope"] = slope
            if layer.op == "upsample_concat_conv2d_relu":
                options |= {"mode": mode, "align_corners": corners}
                launcher, interpolating = kernels.upconcat_conv3x3_fwd, mode != "none"
                function = partial(reference.upsample_concat_conv2d_relu, mode=mode, align_corners=corners, slope=slope)
            elif layer.op == "conv2d_relu_pool":
                launcher = kernels.conv_pool_fwd
                function = partial(_conv_pool, slope=slope)
            else:
                stem = side == 3 and c <= kernels.STEM_CHANNELS
                launcher = kernels.stem_fwd if stem else kernels.conv_fwd
                function = partial(reference.conv2d_relu, slope=slope)

        if launcher is kernels.stem_fwd:
            chooser = partial(_stem_configs, c, out, h, w, precise)
        else:
            shape = channels, out, *source, inputs[0].dtype
            chooser = partial(tuning.conv_configs, *shape, precise=precise, interpolating=interpolating)
        hopper = ()
        if launcher is not kernels.stem_fwd:
            maps = tuple(tuple(x.shape) for x in inputs)
            hopper = kernels.hopper.layer_configs(
                layer.op, maps, tuple(weight.shape), weight.dtype, mode=mode, tf32=tf32
            )
        yield Launch(layer, launcher, function, (*inputs, weight, bias), options, chooser, hopper)


def _stem_configs(
    channels: int, out: int, height: int, width: int, precise: bool, capability: tuple[int, int]
) -> tuple[tuning.ConvConfig, ...]:
    return (tuning.stem_config(channels, out, height, width, precise=precise),)  # the same on every device


def _conv_pool(x: Tensor, weight: Tensor, bias: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    y = reference.conv2d_relu(x, weight, bias, slope)
    return y, F.max_pool2d(y, 2)


def check_configs(
    config: UNetConfig, size: tuple[int, int, int], device: str, dtype: torch.dtype, seed: int
) -> Iterator[Comparison]:
    """Each layer of a network under each launch configuration that its launcher may choose on ``device``.

    Args:
        size: (batch, height, width).
        seed: of the random tensors.

    Returns:
        Comparisons of kind ``"config"``, one at a time; of a kernel with a pooled result, of both
        results together. float32 is checked in tf32 and in full.
    """
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int, fan_in: int = 1) -> Tensor:
        # The strides that the operators give their results, also where sizes of 1 leave a choice.
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        values = torch.randn(shape, generator=generator) / fan_in**0.5
        return torch.empty(shape, dtype=dtype, device=device, memory_format=layout).copy_(values)

    capability = tuning.capability(torch.device(device))
    for tf32 in (True, False) if dtype == torch.float32 else (True,):
        rounds = tf32 and dtype == torch.float32 and device != "cpu"  # the interpreter does not
        for launch in launches(config, size, make, tf32=tf32):
            with tf32_convolutions(tf32):
                baseline = _flat(launch.function(*launch.tensors))
            truth = _flat(launch.function(*(t.double() for t in launch.tensors)))
            # Gluon has no interpreter; tests/hopper/ has an emulator.
            hopper = launch.hopper if device != "cpu" and capability == tuning.HOPPER else ()
            for choice in (*launch.configs(capability), *hopper):
                text = f"{choice}, {'tf32' if tf32 else 'ieee'}" if dtype == torch.float32 else str(choice)
                yield _check_config(launch, choice, text, baseline, truth, rounds)


def _check_config(launch: Launch, choice: Config, text: str, baseline: Tensor, truth: Tensor, tf32: bool) -> Comparison:
    """One configuration, over memory filled with NaN, and once more: the same to the bit."""

    def broken(reason: str) -> Comparison:
        errors = distance(baseline, truth)
        return Comparison(
            "config", launch.layer.name, text, Parity(False, math.inf, errors.max, 0.0, reason), errors, errors
        )

    try:
        with poisoned_memory():
            result, again = _flat(launch.run(choice)), _flat(launch.run(choice))
    except Exception as error:  # too much shared memory, say: the other configurations go on
        return broken(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    repeated = same("", {"result": result}, {"result": again})
    if not repeated.ok:
        return broken(f"a second run is another: {repeated.detail}")
    interpreted = not result.is_cuda
    parity = compare(result, baseline, truth, tf32=tf32, stages=truncating_stages(1, result.dtype, interpreted))
    return Comparison("config", launch.layer.name, text, parity, distance(result, truth), distance(baseline, truth))


def _flat(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.flatten() for t in (result if isinstance(result, tuple) else (result,))])
