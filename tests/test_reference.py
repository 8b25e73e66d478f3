"""The reference blocks against values worked out by hand, and the seed's own shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastunet import FastUNet, UNetConfig
from fastunet.reference import DoubleConv, Down, InstanceNorm2d, UNet, Up, pad_to, upsample


def identity_conv(conv: nn.Module, gain: float = 1.0) -> None:
    """Make a one-channel 3x3 convolution pass its input, times ``gain``."""
    assert isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, 0, 1, 1] = gain
        assert conv.bias is not None
        conv.bias.zero_()


def test_double_conv_by_hand():
    block = DoubleConv(1, 1)
    for index in (0, 2):
        conv = block.net[index]
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        nn.init.ones_(conv.weight)
        nn.init.constant_(conv.bias, -1.0)
    x = torch.tensor([[[[1.0, 0.0], [0.0, -3.0]]]])
    # The first sums all four pixels everywhere: -2 - 1 = -3, cut to 0. The second: 0 - 1, cut to 0.
    assert torch.equal(block(x), torch.zeros(1, 1, 2, 2))
    # Sum 4, minus 1: 3 everywhere; four of them, minus 1: 11.
    assert torch.equal(block(torch.ones(1, 1, 2, 2)), torch.full((1, 1, 2, 2), 11.0))


def test_down_returns_pooled_then_feature():
    down = Down(1, 1)
    for index in (0, 2):
        identity_conv(down.conv.net[index])
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    pooled, feature = down(x)
    assert torch.equal(feature, x)
    assert torch.equal(pooled, torch.tensor([[[[5.0, 7.0], [13.0, 15.0]]]]))


def test_up_concatenates_upsampled_then_skip():
    up = Up(2, 1)
    identity_conv(up.conv.net[0])  # its only tap reads channel 0: the upsampled map
    identity_conv(up.conv.net[2])
    x = torch.tensor([[[[0.0, 3.0]]]])
    # align_corners: the ends keep their values, the two between lie at thirds.
    row = [0.0, 1.0, 2.0, 3.0]
    assert torch.allclose(up(x, torch.full((1, 1, 2, 4), 9.0)), torch.tensor([[[row, row]]]))


def test_upsampling_by_hand():
    x = torch.tensor([[[[0.0, 4.0]]]])
    assert torch.equal(upsample(x, "nearest", False)[0, 0, 0], torch.tensor([0.0, 0.0, 4.0, 4.0]))
    assert torch.equal(upsample(x, "bilinear", False)[0, 0, 0], torch.tensor([0.0, 1.0, 3.0, 4.0]))
    assert upsample(x, "none", False) is x


def test_the_odd_row_and_column_go_below_and_right():
    padded = pad_to(torch.ones(1, 1, 2, 2), 3, 5)
    assert torch.equal(
        padded[0, 0], torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    )


def test_state_dict_keys_are_the_seeds():
    assert list(DoubleConv(1, 2).state_dict()) == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    assert list(Down(1, 2).state_dict())[0] == "conv.net.0.weight"
    assert list(Up(3, 2).state_dict())[0] == "conv.net.0.weight"


def test_the_seeds_walk_from_256():
    """Three poolings reach the 32x32 bottleneck of the tutorial; its Up keeps 1024 channels, so 1536 meet."""
    trace = {}
    net = UNet(features=(64, 128, 512, 1024))

    def note(name):
        def hook(module, inputs, output):
            trace[name] = (tuple(inputs[0].shape), output)

        return hook

    for name in ("downs.0", "downs.2", "bottleneck", "ups.0.up", "ups.0.conv"):
        net.get_submodule(name).register_forward_hook(note(name))
    with torch.device("meta"):
        x = torch.empty(1, 1, 256, 256)
    net.to("meta")(x)
    pooled, feature = trace["downs.0"][1]
    assert feature.shape == (1, 64, 256, 256) and pooled.shape == (1, 64, 128, 128)
    assert trace["bottleneck"][0] == (1, 512, 32, 32) and trace["bottleneck"][1].shape == (1, 1024, 32, 32)
    assert trace["ups.0.up"][1].shape == (1, 1024, 64, 64)
    assert trace["ups.0.conv"][0] == (1, 1536, 64, 64) and trace["ups.0.conv"][1].shape == (1, 512, 64, 64)


@pytest.mark.parametrize("kind", ["bilinear_conv", "transpose"])
def test_the_seeds_text_halves_the_channels(kind):
    """[1, 1024, 32, 32] -> [1, 512, 64, 64], and 1024 channels after concatenation."""
    up = Up(1024, 512, upsample=kind).to("meta")
    assert up.up(torch.empty(1, 1024, 32, 32, device="meta")).shape == (1, 512, 64, 64)
    x, skip = torch.empty(1, 1024, 32, 32, device="meta"), torch.empty(1, 512, 64, 64, device="meta")
    assert up(x, skip).shape == (1, 512, 64, 64)


@pytest.mark.parametrize("kind", ["bilinear", "bilinear_conv", "nearest", "transpose"])
@pytest.mark.parametrize("features", [(4,), (4, 6), (4, 6, 9, 5)], ids=["no-pool", "one-pool", "uneven-widths"])
@pytest.mark.parametrize("size", [(8, 8), (13, 10), (21, 8)], ids=["divides", "odd", "odd-tall"])
def test_any_depth_width_and_size(kind, features, size, seed):
    net = UNet(2, 3, features, upsample=kind).double()
    y = net(torch.randn(2, 2, *size, dtype=torch.float64))
    assert y.shape == (2, 3, *size) and y.dtype == torch.float64


@pytest.mark.parametrize("kind, upsampled", [("nearest", (9, 5)), ("transpose", (4, 6)), ("bilinear_conv", (4, 6))])
def test_a_decoder_of_its_own_widths(kind, upsampled):
    """(middle, out) of each level, from full resolution down; learned upsampling gives the skip's channels."""
    net = UNet(2, 3, (4, 6, 5), upsample=kind, decoder_features=((7, 8), (10, 9)))
    shapes = {name: tuple(p.shape[:2]) for name, p in net.named_parameters() if p.ndim == 4}
    assert shapes["ups.1.conv.net.0.weight"] == (7, 4 + upsampled[0]) and shapes["ups.1.conv.net.2.weight"] == (8, 7)
    assert shapes["ups.0.conv.net.0.weight"] == (10, 6 + upsampled[1]) and shapes["ups.0.conv.net.2.weight"] == (9, 10)
    assert shapes["head.weight"] == (3, 8)
    assert net(torch.randn(1, 2, 9, 11)).shape == (1, 3, 9, 11)


@pytest.mark.parametrize("norm", [None, "batch", "instance"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_blocks_hold_the_layers_asked_for(norm, activation):
    layers = DoubleConv(1, 2, norm=norm, activation=activation, negative_slope=0.2).net
    kinds = [type(layer) for layer in layers]
    expected = {None: [], "batch": [nn.BatchNorm2d], "instance": [InstanceNorm2d]}[norm]
    assert kinds == [nn.Conv2d, *expected, nn.ReLU if activation == "relu" else nn.LeakyReLU] * 2
    last = layers[-1]
    assert not isinstance(last, nn.LeakyReLU) or last.negative_slope == 0.2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"in_channels": 0}, "in_channels: expected a positive integer, got 0"),
        ({"out_channels": 1.5}, "out_channels: expected a positive integer, got 1.5"),
        ({"features": ()}, "features: expected at least one level"),
        ({"features": 64}, "features: expected a sequence of positive integers, got 64"),
        ({"upsample": "cubic"}, "upsample: expected one of 'bilinear'.*got 'cubic'"),
        ({"norm": "layer"}, "norm: expected one of None, 'batch', 'instance', got 'layer'"),
        ({"activation": "gelu"}, "activation: expected one of 'relu', 'leaky_relu', got 'gelu'"),
        (
            {"activation": "leaky_relu", "negative_slope": 1.0},
            r"negative_slope: expected a number in \[0, 1\), got 1.0",
        ),
        ({"negative_slope": "a"}, r"negative_slope: expected a number in \[0, 1\), got 'a'"),
        (
            {"features": (2, 3), "decoder_features": ((2, 2), (2, 2))},
            r"decoder_features: expected None or \(middle, out\) for each of 1 levels, got \(\(2, 2\), \(2, 2\)\)",
        ),
        ({"features": (2, 3), "decoder_features": (4,)}, r"decoder_features: expected .* got \(4,\)"),
        ({"features": (2, 3), "decoder_features": ((0, 1),)}, r"decoder_features: expected .* got \(\(0, 1\),\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNet(**arguments)


def test_bad_inputs_are_named():
    net = UNet(features=(2, 2, 2, 2))
    with pytest.raises(ValueError, match=r"x: expected shape \(N, 1, H, W\), got \(1, 3, 32, 32\)"):
        net(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"x: expected H and W of at least 8 \(3 poolings\), got \(1, 1, 7, 32\)"):
        net(torch.zeros(1, 1, 7, 32))
    with pytest.raises(ValueError, match="x: expected a tensor of floating-point numbers, got torch.uint8"):
        net(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="x: expected a tensor of floating-point numbers, got ndarray"):
        net(torch.zeros(1, 1, 32, 32).numpy())
    with pytest.raises(ValueError, match="instance norm needs more than one pixel at the bottleneck"):
        UNet(features=(2, 2, 2), norm="instance")(torch.zeros(1, 1, 4, 7))


@given(st.data())
def test_the_smallest_size_leaves_every_map_a_pixel(data):
    depth = data.draw(st.integers(0, 4))
    convs, steps = st.integers(1, 3), st.integers(1, 3)
    config = UNetConfig(
        1, 1, (1,) * (depth + 1), "transpose", match="center_crop", padding="valid",
        encoder_convs=data.draw(st.tuples(*[convs] * (depth + 1))),
        decoder_convs=data.draw(st.tuples(*[convs] * depth)),
        strides=data.draw(st.tuples(*[st.tuples(steps, steps)] * depth)),
    )  # fmt: skip

    def least_side(size: int) -> int:
        return min(min(*down, *up) for down, up in (config.sides(size, axis) for axis in (0, 1)))

    assert least_side(config.minimum_size) >= 1 > least_side(config.minimum_size - 1)


def test_the_smallest_size_counts_rows_and_columns(monkeypatch):
    """Unpadded, with steps that halve the columns alone: those are used up first."""
    config = UNetConfig(1, 1, (1, 1, 1), "transpose", strides=((1, 1), (1, 2)), match="center_crop", padding="valid")
    least = config.minimum_size
    network = UNet.from_config(config)
    assert min(network(torch.zeros(1, 1, least, least)).shape) >= 1
    with pytest.raises(ValueError, match=f"of at least {least}"):
        network(torch.zeros(1, 1, least - 1, least - 1))
    monkeypatch.setattr(UNet, "check_input", lambda network, x: None)
    with pytest.raises(RuntimeError, match="Kernel size"):
        network(torch.zeros(1, 1, least - 1, least - 1))


@pytest.mark.parametrize("order", ["conv_norm_act", "conv_act_norm"])
@pytest.mark.parametrize("network", [UNet, FastUNet])
def test_gradients_of_one_image_are_the_same_in_channels_last(network, order, seed):
    """Of PyTorch 2.13's own instance norm they are not, with the norm behind the activation."""
    net = network(1, 2, (2, 3), norm="instance", order=order).double()
    twin = copy.deepcopy(net).to(memory_format=torch.channels_last)
    x = torch.randn(1, 1, 12, 11, dtype=torch.float64)
    for each in (net, twin):
        each(x).square().mean().backward()
    for (name, p), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, p.grad, rtol=1e-9, atol=1e-9, check_stride=False, msg=name)
