"""The trace on paper against what PyTorch really does, seen through forward hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastunet import FastUNet, dispatch
from fastunet.config import NORM, UPSAMPLE, UNetConfig
from fastunet.ops.upsampling import launched
from fastunet.parity.recording import Recorder
from fastunet.reference import UNet
from fastunet.trace import describe_flops, totals, trace

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)

widths = st.integers(1, 5)
steps = st.sampled_from((1, 2))


@st.composite
def configs(draw: Callable) -> UNetConfig:
    features = tuple(draw(st.lists(widths, min_size=1, max_size=4)))
    depth = len(features) - 1
    upsample = draw(st.sampled_from(UPSAMPLE))
    kept = None if upsample in ("bilinear", "nearest") else st.tuples(*[widths] * depth)
    if upsample == "bilinear_conv":
        kept = st.tuples(*[st.none() | widths] * depth)
    return UNetConfig(
        in_channels=draw(st.integers(1, 3)),
        out_channels=draw(st.integers(1, 4)),
        features=features,
        upsample=upsample,
        norm=draw(st.sampled_from(NORM)),
        up_features=None if kept is None else draw(st.none() | kept),
        encoder_convs=draw(st.none() | st.tuples(*[st.integers(1, 3)] * (depth + 1))),
        decoder_convs=draw(st.none() | st.tuples(*[st.integers(1, 3)] * depth)),
        strides=draw(st.none() | st.tuples(*[st.tuples(steps, steps)] * depth)) if upsample == "transpose" else None,
        downsample=draw(st.sampled_from(("max_pool", "stride"))),
        concat=draw(st.sampled_from(("upsampled_first", "skip_first"))),
        match=draw(st.sampled_from(("zero_pad", "replicate_pad", "center_crop"))),
        order=draw(st.sampled_from(("conv_norm_act", "conv_act_norm"))),
        conv_bias=draw(st.booleans()),
        decoder_features=draw(st.none() | st.tuples(*[st.tuples(widths, widths)] * (len(features) - 1))),
    )


sizes = st.integers(8, 27)  # three poolings need 8; odd sizes among them


def run_with_hooks(model: UNet, x: torch.Tensor) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """(input shape, output shape) of every convolution, by module path, in the order they run."""
    seen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
            seen[name] = (tuple(args[0].shape), tuple(out.shape))

        return note

    for name, module in model.named_modules():
        if isinstance(module, CONVOLUTIONS):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        model.eval()(x)
    return seen


@settings(max_examples=40, deadline=None)
@given(configs(), sizes, sizes, st.integers(1, 2))
def test_shapes_and_order_are_those_of_the_reference(config: UNetConfig, height: int, width: int, batch: int) -> None:
    # PyTorch's instance norm refuses a bottleneck of one pixel.
    assume(config.norm != "instance" or max(height, width) >= 2 * config.minimum_size)
    if config.downsample == "stride":
        height, width = (size // step * step for size, step in zip((height, width), config.reductions, strict=True))
    model = UNet.from_config(config)
    seen = run_with_hooks(model, torch.zeros(batch, config.in_channels, height, width))
    layers = trace(config, height, width, batch)

    assert [layer.name for layer in layers] == list(seen)
    for layer in layers:
        into, out = seen[layer.name]
        if layer.name.endswith(".up.1") and layer.activation is None:
            # The reference interpolates first; we do after the 1x1 convolution.
            into, out = ((*shape[:2], shape[2] // 2, shape[3] // 2) for shape in (into, out))
        assert layer.out_shape == out, layer.name
        if len(layer.in_shapes) == 2:
            x, skip = layer.in_shapes
            assert x[1] + skip[1] == into[1]
            assert skip[2:] == into[2:]
        else:
            assert layer.in_shapes == (into,), layer.name


@settings(max_examples=40, deadline=None)
@given(configs())
def test_parameters_are_counted_layer_by_layer(config: UNetConfig) -> None:
    model = UNet.from_config(config)
    layers = trace(config, 16, 16)
    assert totals(layers)[0] == sum(parameter.numel() for parameter in model.parameters())
    modules = dict(model.named_modules())
    for layer in layers:
        expected = sum(p.numel() for p in modules[layer.name].parameters())
        if layer.norm is not None:
            expected += sum(p.numel() for p in modules[layer.norm].parameters())
        assert layer.parameters == expected, layer.name
        assert layer.weight_shape == modules[layer.name].weight.shape, layer.name


UNPADDED = {"padding": "valid", "match": "center_crop"}


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize(
    "options",
    [
        {"upsample": "bilinear"},
        {"upsample": "nearest", "match": "replicate_pad"},
        {"upsample": "nearest_conv", "match": "center_crop"},
        *({"upsample": kind, **UNPADDED} for kind in ("bilinear", "bilinear_conv", "nearest_conv", "transpose")),
        {"upsample": "transpose", "downsample": "stride", "strides": ((2, 1), (1, 2))},
    ],
    ids=str,
)
def test_maps_are_those_that_operators_get(options: dict[str, Any], implementation: str) -> None:
    size = (23, 22) if "downsample" not in options else (6, 6)
    if options.get("padding") == "valid":
        size = (37, 36)
    model = FastUNet(1, 1, (1, 2, 2), encoder_convs=(1, 1, 1), decoder_convs=(1, 1), **options).eval()
    with torch.no_grad(), dispatch.forced(implementation), Recorder() as recorder:
        model(torch.zeros(1, 1, *size))
    layers = trace(model.config, *size)
    for layer, step in zip(layers, recorder.steps, strict=True):
        given = step.arguments
        skip = given.get("skip")
        shapes, mode = (given["x"].shape,), "none"
        if skip is not None:
            shapes, mode = launched(given["x"], skip, given["mode"], given["match"])
        assert (layer.in_shapes, layer.mode) == (shapes, mode), layer.name
        assert layer.out_shape == step.result.shape, layer.name
        if implementation == "triton":
            assert step.implementation == "triton", layer.name
        if layer.op != "conv_transpose2x2":
            stride = tuple(given.get("stride", (1, 1)))
            assert (layer.stride, layer.padding) == (stride, given["padding"]), layer.name


# bilinear_conv is left out: PyTorch's count is of its 1x1 convolution at the higher resolution.
@pytest.mark.parametrize("upsample", ["bilinear", "nearest", "transpose"])
@pytest.mark.parametrize("size", [(64, 64), (35, 50)], ids=["64x64", "35x50"])
def test_flops_are_those_of_pytorchs_counter(upsample: str, size: tuple[int, int]) -> None:
    model = UNet(3, 2, (4, 8, 16), upsample=upsample)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 3, *size))
    assert totals(trace(model.config, *size, batch=2))[1] == counter.get_total_flops()


@pytest.mark.parametrize("norm", NORM)
def test_only_instance_norm_keeps_the_pooling_apart(norm: str | None) -> None:
    ops = [layer.op for layer in trace(UNetConfig(features=(4, 8, 16), norm=norm), 16, 16)]
    assert ops.count("conv2d_relu_pool") == (0 if norm == "instance" else 2)
    assert ops.count("upsample_concat_conv2d_relu") == 2


def test_the_tutorials_sizes() -> None:
    """Four poolings of 256 end at 16, and its bilinear code concatenates 1536 channels."""
    layers = {layer.name: layer for layer in trace(UNetConfig(), 256, 256)}
    assert layers["bottleneck.net.0"].in_shapes == ((1, 512, 16, 16),)
    assert layers["ups.0.conv.net.0"].in_shapes == ((1, 1024, 16, 16), (1, 512, 32, 32))


@pytest.mark.parametrize(
    ("size", "named"),
    [((15, 16, 1), "height: expected at least 16"), ((16, 1, 1), "width: "), ((16, 16, 0), "batch: ")],
    ids=["height", "width", "batch"],
)
def test_impossible_sizes_are_named(size: tuple[int, int, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        trace(UNetConfig(), *size)


@pytest.mark.parametrize(
    ("flops", "text"),
    [
        (0, "0 FLOP"),
        (999, "999 FLOP"),
        (999_999, "1 MFLOP"),
        (1_230_000_000, "1.23 GFLOP"),
        (3 * 10**16, "30 PFLOP"),
    ],
)
def test_flops_in_words(flops: int, text: str) -> None:
    assert describe_flops(flops) == text


def test_the_papers_sizes() -> None:
    """Unpadded convolutions and cropped skips take 572 to 388, by way of 28 (Ronneberger et al. 2015, figure 1)."""
    config = UNetConfig(upsample="transpose", padding="valid", match="center_crop")
    layers = {layer.name: layer for layer in trace(config, 572, 572)}
    assert layers["bottleneck.net.2"].out_shape == (1, 1024, 28, 28)
    assert layers["ups.0.conv.net.0"].in_shapes == ((1, 512, 56, 56), (1, 512, 56, 56))
    assert layers["head"].out_shape == (1, 2, 388, 388)
