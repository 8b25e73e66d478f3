"""The Hopper kernels in the emulator, by the parity rule: every kind of tile, odd sizes, both ends of the schedule."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastunet import UNetConfig, reference
from fastunet.kernels import hopper
from fastunet.kernels.hopper import conv3x3
from fastunet.parity.configs import _check_config
from fastunet.parity.launches import launches, with_moments
from fastunet.reference import conv2d_relu

from ..kernels.conftest import WITHOUT_IEEE, check, make, precision
from ..kernels.test_head import with_head
from .conftest import config_of

__all__ = ["make", "precision"]  # fixtures

pytestmark = pytest.mark.usefixtures("poisoned", "emulate")

# Each a kind of tile. Windows of 8 columns begin at the least offset that they may.
CONFIGS = [
    pytest.param(config_of(64, (1, 4, 8), True, 2, 3), id="in-turns-halo"),
    pytest.param(config_of(128, (1, 4, 16), True, 2, 4), id="cooperative-halo"),
    pytest.param(config_of(64, (1, 8, 4), False, 2, 2), id="in-turns"),
    pytest.param(config_of(128, (4, 4, 2), False, 3, 2), id="cooperative-several-images"),
    pytest.param(config_of(128, (1, 4, 8), True, 3, 8, splits=2), id="cooperative-split"),
    pytest.param(config_of(64, (2, 4, 4), False, 2, 2, splits=2), id="in-turns-split"),
]


def check_conv_relu_pool(config, shape, precision, make):
    n, c, h, w, o = shape
    c = c // 2 if precision == "tf32" else c  # as many steps, of 128 bytes of channels
    x, weight, bias = make(precision, n, c, h, w), make(precision, o, c, 3, 3, fan_in=9 * c), make(precision, o)
    y, pooled = hopper.conv_pool_fwd(x, weight, bias, slope=0.0, config=config)
    check(precision, y, conv2d_relu, x, weight, bias, 0.0)
    assert torch.equal(pooled, F.max_pool2d(y, 2))


@pytest.mark.parametrize("precision", WITHOUT_IEEE, indirect=True)
@pytest.mark.parametrize("config", CONFIGS)
def test_an_odd_map_and_part_of_a_block(config, precision, make):
    check_conv_relu_pool(config, (3, 96, 5, 11, 72), precision, make)


@pytest.mark.parametrize("config", CONFIGS)
def test_more_output_channels_than_a_tile(config, make):
    check_conv_relu_pool(config, (1, 128, 6, 16, 136), "bf16", make)


@pytest.mark.parametrize("config", CONFIGS)
def test_factors(config, make):
    """A bias of two rows; of a split K loop by who sums the shares."""
    x, weight, bias = make("fp16", 3, 96, 5, 11), make("fp16", 72, 96, 3, 3, fan_in=9 * 96), torch.randn(2, 72)
    y, pooled = hopper.conv_pool_fwd(x, weight, bias, slope=0.1, config=config)
    check("fp16", y, conv2d_relu, x, weight, bias, 0.1)
    assert torch.equal(pooled, F.max_pool2d(y, 2))


def test_factors_of_two_sources_and_before_a_head(make):
    x, skip, bias = make("bf16", 1, 64, 4, 8), make("bf16", 1, 8, 8, 16), torch.randn(2, 64)
    weight = make("bf16", 64, 72, 3, 3, fan_in=9 * 72)
    how = {"mode": "bilinear", "align_corners": True, "slope": 0.0}
    for launch in (hopper.upconcat_conv3x3_fwd, hopper.upconcat_conv3x3_commuted_fwd):
        y = launch(x, skip, weight, bias, **how)
        check("bf16", y, reference.upsample_concat_conv2d_relu, x, skip, weight, bias, "bilinear", True, 0.0)
    head, of_head = make("bf16", 2, 64, 1, 1, fan_in=64), make("bf16", 2)
    y = hopper.conv_head_fwd(x, weight[:, :64], bias, head, of_head, slope=0.0)
    check("bf16", y, with_head, x, weight[:, :64], bias, head, of_head, 0.0)


@pytest.mark.parametrize("eagerness", [0.0, 1.0], ids=["at-the-last-moment", "at-once"])
@pytest.mark.parametrize("config", CONFIGS)
def test_both_ends_of_the_schedule(config, eagerness, emulate, make):
    emulate(eagerness)
    x, weight = make("fp16", 2, 128, 6, 17), make("fp16", 72, 128, 3, 3, fan_in=1152)
    y = hopper.conv_fwd(x, weight, None, slope=0.1, config=config)
    check("fp16", y, conv2d_relu, x, weight, None, 0.1)


def test_the_same_on_every_schedule(emulate, make):
    """Neither a split K loop nor a pool depends on who comes first."""
    x, weight = make("bf16", 1, 128, 6, 9), make("bf16", 64, 128, 3, 3, fan_in=1152)
    config = config_of(64, (1, 4, 8), True, 2, 3, splits=2)
    results = []
    for eagerness in (0.0, 0.3, 1.0):
        emulate(eagerness)
        results.append(hopper.conv_pool_fwd(x, weight, None, slope=0.0, config=config))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("precision", WITHOUT_IEEE, indirect=True)
@pytest.mark.parametrize(
    "mode, config",
    [
        pytest.param("none", *CONFIGS[0].values, id="none-halo"),
        pytest.param("nearest", *CONFIGS[3].values, id="nearest-several-images"),
        pytest.param("bilinear", *CONFIGS[4].values, id="bilinear-split"),
    ],
)
def test_two_sources(config, mode, precision, make):
    h, w = (4, 5) if mode == "none" else (2, 3)
    c1, c2 = 40, 64 if config.splits == 2 else 104  # parts of blocks, and for two shares two blocks
    if precision == "tf32":
        c1, c2 = c1 // 2, c2 // 2
    x, skip = make(precision, 2, c1, h, w), make(precision, 2, c2, 7, 9)  # padded, by an odd number of rows
    weight, bias = make(precision, 48, c1 + c2, 3, 3, fan_in=9 * (c1 + c2)), make(precision, 48)
    y = hopper.upconcat_conv3x3_fwd(x, skip, weight, bias, mode=mode, align_corners=True, slope=0.0, config=config)
    check(precision, y, reference.upsample_concat_conv2d_relu, x, skip, weight, bias, mode, True, 0.0)


def test_no_skip_comes_in(make):
    """Into the convolution behind nearest upsampling, either way."""
    x, skip = make("bf16", 2, 72, 2, 3), make("bf16", 2, 0, 5, 6)
    weight, bias = make("bf16", 48, 72, 3, 3, fan_in=648), make("bf16", 48)
    for launch in (hopper.upconcat_conv3x3_fwd, hopper.upconcat_conv3x3_commuted_fwd):
        y = launch(x, skip, weight, bias, mode="nearest", align_corners=False, slope=0.0)
        check("bf16", y, reference.upsample_concat_conv2d_relu, x, skip, weight, bias, "nearest", False, 0.0)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3], CONFIGS[4]])
def test_a_float32_result_is_not_rounded_to_less(config, make):
    x, weight, bias = make("bf16", 2, 128, 5, 9), make("bf16", 72, 128, 3, 3, fan_in=1152), make("bf16", 72)
    y = hopper.conv_fwd(x, weight, bias, slope=0.0, config=config, out_dtype=torch.float32)
    assert y.dtype == torch.float32
    check("ieee", y, conv2d_relu, x.float(), weight.float(), bias.float(), 0.0)


@pytest.mark.parametrize("precision", WITHOUT_IEEE, indirect=True)
@pytest.mark.parametrize("mode, corners", [("nearest", False), ("bilinear", False), ("bilinear", True)])
def test_upsampling_behind_the_products(mode, corners, precision, make):
    c1, c2 = (40, 24) if precision == "tf32" else (72, 40)
    x, skip = make(precision, 2, c1, 3, 4), make(precision, 2, c2, 7, 7)  # a row too few, a column too many
    weight, bias = make(precision, 16, c1 + c2, 3, 3, fan_in=9 * (c1 + c2)), make(precision, 16)
    options = {"mode": mode, "align_corners": corners, "slope": 0.1}
    y = hopper.upconcat_conv3x3_commuted_fwd(x, skip, weight, bias, **options)
    check(precision, y, reference.upsample_concat_conv2d_relu, x, skip, weight, bias, mode, corners, 0.1)


def input_gradient(g, weight):
    return F.conv_transpose2d(g, weight, padding=weight.shape[-1] // 2)


@pytest.mark.parametrize("precision", WITHOUT_IEEE, indirect=True)
@pytest.mark.parametrize("ksize", [3, 1])
@pytest.mark.parametrize("config", [None, CONFIGS[3], CONFIGS[4]])
def test_the_gradient_of_an_input(config, ksize, precision, make):
    o, c = (64, 36) if precision == "tf32" else (128, 72)
    g, weight = make(precision, 3, o, 5, 11), make(precision, o, c, ksize, ksize, fan_in=ksize**2 * o)
    check(precision, hopper.conv_dgrad(g, weight, config=config), input_gradient, g, weight)


@pytest.mark.parametrize("precision", WITHOUT_IEEE, indirect=True)
def test_one_by_one(precision, make):
    config = config_of(128, (2, 4, 8), False, 2, 2)
    x, weight, bias = make(precision, 3, 72, 5, 6), make(precision, 136, 72, 1, 1, fan_in=72), make(precision, 136)
    check(precision, hopper.conv_fwd(x, weight, bias, slope=1.0, config=config), conv2d_relu, x, weight, bias, 1.0)


@pytest.mark.parametrize("precision", WITHOUT_IEEE, indirect=True)
@pytest.mark.parametrize("o", [16, 72], ids=["both-columns-in-a-tile", "a-tile-of-both-columns"])
@pytest.mark.parametrize(
    "config", [config_of(128, (2, 4, 8), False, 2, 2), config_of(64, (1, 4, 16), False, 3, 3)], ids=["128", "64"]
)
def test_transposed(config, o, precision, make):
    x, weight, bias = make(precision, 3, 72, 5, 6), make(precision, 72, o, 2, 2, fan_in=72), make(precision, o)
    y = hopper.conv_transpose_fwd(x, weight, bias, config=config)
    check(precision, y, reference.conv_transpose2x2, x, weight, bias)


def test_a_transposed_convolution_of_choice(make):
    """Its weight as prepared for it, which is not copied, and as PyTorch has it."""
    x, weight = make("bf16", 5, 64, 4, 3), make("bf16", 64, 32, 2, 2, fan_in=64)
    prepared = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    for w in (weight, prepared):
        check("bf16", hopper.conv_transpose_fwd(x, w, None), reference.conv_transpose2x2, x, w, None)


def test_a_transposed_convolution_does_not_split_its_k_loop(make):
    x, weight = make("bf16", 1, 64, 4, 4), make("bf16", 64, 32, 2, 2)
    with pytest.raises(ValueError, match="config: expected one that does not split the K loop, got hopper 64 x"):
        hopper.conv_transpose_fwd(x, weight, None, config=config_of(64, (1, 4, 8), False, 2, 2, splits=2))


@pytest.mark.parametrize("n, h, w", [(1, 17, 9), (5, 4, 4), (2, 1, 3)], ids=["halo", "several-images", "one-row"])
def test_the_configuration_of_choice(n, h, w, make):
    x, weight = make("bf16", n, 64, h, w), make("bf16", 64, 64, 3, 3, fan_in=576)
    y = hopper.conv_fwd(x, weight, None, slope=0.0)
    check("bf16", y, conv2d_relu, x, weight, None, 0.0)


@pytest.mark.parametrize("precision", WITHOUT_IEEE, indirect=True)
@pytest.mark.parametrize("o, classes", [(64, 2), (24, 5)], ids=["whole", "fewer-channels"])
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2]])
def test_a_head(config, o, classes, precision, make):
    x, weight, bias = make(precision, 3, 72, 5, 11), make(precision, o, 72, 3, 3, fan_in=648), make(precision, o)
    head, head_bias = make(precision, classes, o, 1, 1, fan_in=o), make(precision, classes)
    logits = hopper.conv_head_fwd(x, weight, bias, head, head_bias, slope=0.1, config=config)
    check(precision, logits, with_head, x, weight, bias, head, head_bias, 0.1, stages=2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_come_through_a_head(value, make):
    """Also where a tile has rows without a channel, which make NaN of an infinite x."""
    x, weight, head = make("fp16", 1, 16, 5, 6), make("fp16", 16, 16, 3, 3).abs(), make("fp16", 2, 16, 1, 1).abs()
    x[0, 2, 3, 4] = value
    logits = hopper.conv_head_fwd(x, weight, None, head, None, slope=0.0)
    check("fp16", logits, with_head, x, weight, None, head, None, 0.0, stages=2)


def test_a_head_takes_no_split_k_loop_nor_half_of_the_channels(make):
    x, weight, head = make("bf16", 1, 128, 4, 4), make("bf16", 64, 128, 3, 3), make("bf16", 2, 64, 1, 1)
    split, shared = config_of(64, (2, 4, 4), False, 2, 2, splits=2), config_of(128, (1, 4, 16), True, 2, 4)
    with pytest.raises(ValueError, match="config: expected one that does not split the K loop, got hopper 64 x"):
        hopper.conv_head_fwd(x, weight, None, head, None, slope=0.0, config=split)
    with pytest.raises(ValueError, match="config: expected a tile of 64 channels, .* for a head, got hopper 128 x"):
        hopper.conv_head_fwd(x, weight, None, head, None, slope=0.0, config=shared)


def moments_of(y, per_image):
    """Mean, rstd and unbiased variance, of eps 1e-3."""
    axes = (2, 3) if per_image else (0, 2, 3)
    variance, mean = torch.var_mean(y, axes, correction=0)
    count = y.numel() // mean.numel()
    return mean, torch.rsqrt(variance + 1e-3), variance * count / (count - 1)


def check_moments(precision, got, plain, tensors, per_image):
    """The map by the rule; its statistics, float32, are those of the map as it was stored."""
    y, *statistics = got
    check(precision, y, plain, *tensors)
    for mine, exact in zip(statistics, moments_of(y.double(), per_image), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "image"])
@pytest.mark.parametrize("precision", WITHOUT_IEEE, indirect=True)
@pytest.mark.parametrize("config", CONFIGS)
def test_moments_come_with_a_map(config, precision, per_image, make):
    """Of parts of tiles too; where a tile has several images, or a share of the K loop, by a pass of their own."""
    c = 64 if precision == "tf32" else 128
    x, weight, bias = make(precision, 3, c, 5, 11), make(precision, 72, c, 3, 3, fan_in=9 * c), make(precision, 72)
    got = hopper.conv_moments_fwd(x, weight, bias + 30, eps=1e-3, per_image=per_image, config=config)
    check_moments(precision, got, partial(conv2d_relu, slope=1.0), (x, weight, bias + 30), per_image)


@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "image"])
def test_moments_come_with_a_map_of_two_sources(per_image, make):
    x, skip = make("fp16", 2, 40, 4, 5), make("fp16", 2, 104, 7, 9)
    weight, bias = make("fp16", 48, 144, 3, 3, fan_in=9 * 144), make("fp16", 48)
    options = {"mode": "none", "align_corners": False, "config": CONFIGS[0].values[0]}
    got = hopper.upconcat_conv3x3_moments_fwd(x, skip, weight, bias, eps=1e-3, per_image=per_image, **options)
    plain = partial(reference.upsample_concat_conv2d_relu, mode="none", align_corners=False, slope=1.0)
    check_moments("fp16", got, plain, (x, skip, weight, bias), per_image)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_moments_are_among_the_configurations_that_are_checked(norm, seed):
    """``fastunet verify --all-configs`` on a Hopper GPU, of a layer of a normed network in training."""
    config = UNetConfig(1, 2, (64, 64), norm=norm)
    make = lambda *shape, fan_in=1: (torch.randn(shape) / fan_in**0.5).bfloat16()
    checked = []
    for layer in launches(config, (1, 8, 16), make, training=True):
        for launch in with_moments(layer):
            choice = next(c for c in launch.hopper if c.splits == 1)
            found = _check_config(launch, choice, str(choice), True, False)
            assert found.parity.ok, str(found.parity)
            checked.append((launch.name, launch.options["per_image"]))
    first, last = "downs.0.conv.net.3, in training", "ups.0.conv.net.3, in training"
    assert checked[:2] == [(first, False), (first, True)] and checked[-1] == (last, True) and len(checked) == 10


def test_moments_that_are_not_the_maps_are_named(seed, monkeypatch):
    make = lambda *shape, fan_in=1: (torch.randn(shape) / fan_in**0.5).bfloat16()
    layers = launches(UNetConfig(1, 2, (64, 64), norm="batch"), (1, 8, 16), make, training=True)
    (launch, _) = next(found for found in map(list, map(with_moments, layers)) if found)
    right = conv3x3._with_statistics

    def biased(*arguments):
        y, mean, rstd, variance = right(*arguments)
        return y, mean, rstd, variance * (1 - 1 / 128)

    monkeypatch.setattr(conv3x3, "_with_statistics", biased)
    choice = next(c for c in launch.hopper if c.splits == 1)
    found = _check_config(launch, choice, str(choice), True, False)
    assert not found.parity.ok and found.parity.reason.startswith("variance is off by")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "minus-inf"])
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[5]])
def test_nan_and_inf_go_where_torch_lets_them(config, value, make):
    x, weight = make("fp16", 1, 128, 7, 10), make("fp16", 64, 128, 3, 3, fan_in=1152)
    x[0, 2, 3, 4] = value
    y, pooled = hopper.conv_pool_fwd(x, weight, None, slope=0.0, config=config)
    check("fp16", y, conv2d_relu, x, weight, None, 0.0)
    check("fp16", pooled, lambda *a: F.max_pool2d(conv2d_relu(*a), 2), x, weight, None, 0.0)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "every-second-pixel": lambda x: x.repeat_interleave(2, 3).contiguous(memory_format=torch.channels_last)[..., ::2],
    "one-image-repeated": lambda x: x[:1].expand(2, -1, -1, -1),
    "off-by-one-element": lambda x: torch.cat([x[:, :1], x], 1).contiguous(memory_format=torch.channels_last)[:, 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, make):
    x, weight = LAYOUTS[layout](make("fp16", 2, 16, 5, 6)), make("fp16", 16, 16, 3, 3, fan_in=144)
    y = hopper.conv_fwd(x, weight, None, slope=0.0, config=config_of(64, (1, 4, 8), True, 2, 3))
    check("fp16", y, conv2d_relu, x, weight, None, 0.0)


def test_a_weight_that_begins_anywhere(make):
    x, weight = make("fp16", 1, 16, 5, 6), make("fp16", 16, 16, 3, 3, fan_in=144)
    odd = weight.new_empty(weight.numel() + 1)[1:].view(16, 3, 3, 16).permute(0, 3, 1, 2).copy_(weight)
    y = hopper.conv_fwd(x, odd, None, slope=0.0, config=config_of(64, (1, 4, 8), True, 2, 3))
    check("fp16", y, conv2d_relu, x, weight, None, 0.0)


def test_empty_batch(make):
    x, weight = make("fp16", 0, 16, 4, 6), make("fp16", 8, 16, 3, 3)
    y, pooled = hopper.conv_pool_fwd(x, weight, None, slope=0.0)
    assert y.shape == (0, 8, 4, 6) and pooled.shape == (0, 8, 2, 3)


@pytest.mark.parametrize(
    "c, o, tf32, complaint",
    [(12, 16, True, "multiples of 8"), (16, 2, True, "multiples of 8"), (16, 16, False, "without tf32")],
    ids=["channels", "output-channels", "ieee"],
)
def test_what_cannot_be_served_is_refused(c, o, tf32, complaint, make):
    precision = "fp16" if tf32 else "ieee"
    x, weight = make(precision, 1, c, 4, 4), make(precision, o, c, 3, 3)
    with pytest.raises(ValueError, match=f"x: .*{complaint}"):
        hopper.conv_fwd(x, weight, None, slope=0.0, tf32=tf32)


def test_other_transposed_filters_are_refused(make):
    with pytest.raises(ValueError, match=r"weight: expected 2x2 filters, got \(64, 64, 1, 2\)"):
        hopper.conv_transpose_fwd(make("bf16", 1, 64, 4, 4), make("bf16", 64, 64, 1, 2), None)


def test_a_cropped_source_is_refused(make):
    x, skip, weight = make("fp16", 1, 16, 8, 8), make("fp16", 1, 16, 6, 6), make("fp16", 8, 32, 3, 3)
    with pytest.raises(ValueError, match="cannot crop"):
        hopper.upconcat_conv3x3_fwd(x, skip, weight, None, mode="none", align_corners=False, slope=0.0)
