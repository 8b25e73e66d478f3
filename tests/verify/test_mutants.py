"""``fastunet.verify`` catches deliberate faults of the forward pass, and says where they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import fastunet
from fastunet import FastUNet, dispatch, kernels, reference
from fastunet.ops import forward
from fastunet.parity.fuzz import randomise
from fastunet.reference import UNet

from .networks import Faulty, pair


def shifted_tap(x, weight, bias, slope, *_):
    weight = weight.roll(1, 3) if weight.shape[-1] == 3 else weight
    return reference.conv2d_relu(x, weight, bias, slope)


def no_bias(x, weight, bias, slope, *_):
    return reference.conv2d_relu(x, weight, None, slope)


def replicated_border(x, weight, bias, slope, *_):
    pad = weight.shape[-1] // 2
    y = F.conv2d(F.pad(x, [pad] * 4, mode="replicate"), weight, bias)
    return reference.activate_(y, slope)


def activation_before_bias(x, weight, bias, slope, *_):
    return reference.conv2d_relu(x, weight, None, slope) + bias[:, None, None]


def last_channel_skipped(x, weight, bias, slope, *_):
    return reference.conv2d_relu(x[:, :-1], weight[:, :-1], bias, slope)


def half_precision_sum(x, weight, bias, slope, *_):
    """Each tap's part is rounded to bfloat16 as it is added."""
    pad = weight.shape[-1] // 2
    total = torch.zeros(1, dtype=torch.bfloat16)
    for row in range(weight.shape[-1]):
        for column in range(weight.shape[-1]):
            one = torch.zeros_like(weight)
            one[..., row, column] = weight[..., row, column]
            total = (total + F.conv2d(x, one, None, padding=pad)).bfloat16()
    return reference.activate_(total.to(x.dtype) + bias[:, None, None], slope)


def seam(x, weight, bias, slope, *_):
    y = reference.conv2d_relu(x, weight, bias, slope)
    if x.shape[3] > 16:
        y[..., 16] = reference.conv2d_relu(x[..., 16:], weight, bias, slope)[..., 0]  # as if nothing were left of it
    return y


def half_sum(x, weight, bias, slope, *_):
    """The sum is kept in the working dtype, 16 channels and one tap at a time, as without accumulators."""
    total = torch.zeros(1, dtype=x.dtype)
    taps = [(row, column) for row in range(weight.shape[-1]) for column in range(weight.shape[-1])]
    padded = F.pad(x, [weight.shape[-1] // 2] * 4)
    for row, column in taps:
        for first in range(0, x.shape[1], 16):
            part = padded[:, first : first + 16, row : row + x.shape[2], column : column + x.shape[3]]
            total = total + F.conv2d(part, weight[:, first : first + 16, row, column, None, None])
    return reference.activate_(total + bias[:, None, None], slope)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sum_in_half_precision_is_caught_in_its_layer(dtype, seed, monkeypatch):
    """In one layer of 64 channels, whose roundings drown in those of the layers before."""
    model, plain = FastUNet(1, 2, (16, 64, 64)).eval(), UNet(1, 2, (16, 64, 64)).eval()
    randomise(model, seed)
    plain.load_state_dict(model.state_dict())
    there = model.get_parameter("downs.1.conv.net.2.weight").shape

    def once(x, weight, bias, slope, *_):
        faulty = weight.shape == there and x.shape[-1] == 16  # not the bottleneck's of 8
        return (half_sum if faulty else reference.conv2d_relu)(x, weight, bias, slope)

    monkeypatch.setattr(forward, "reference", Faulty(reference, conv2d_relu=once))
    x = torch.randn(1, 1, 32, 32)
    report = fastunet.verify(model, plain, x, dtype=dtype, gradients=False, deterministic=False)
    assert report.first_failure is not None, str(report)
    assert report.first_failure.name == "downs.1.conv.net.2", str(report)
    assert report.first_failure.alone is not None and not report.first_failure.alone.parity.ok


# In bfloat16 other corners may hide among the roundings: float32 shows them.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "fault",
    [shifted_tap, no_bias, replicated_border, activation_before_bias, last_channel_skipped, half_precision_sum, seam],
)
def test_a_faulty_convolution_is_caught_in_the_first_layer(fault: Callable, dtype, x, monkeypatch):
    model, plain = pair()
    monkeypatch.setattr(forward, "reference", Faulty(reference, conv2d_relu=fault))
    report = fastunet.verify(model, plain, x, dtype=dtype, deterministic=False)
    assert not report.ok
    assert report.first_failure is not None
    assert report.first_failure.name == "downs.0.conv.net.0", str(report)
    assert f"first to break the rule: layer {report.first_failure.name}, on torch" in str(report)


def swapped_concat(x, skip, weight, bias, mode, align_corners, slope, *_):
    y = reference.upsample_concat(x, skip, mode, align_corners)
    return reference.conv2d_relu(y.roll(skip.shape[1], 1), weight, bias, slope)


def other_corners(x, skip, weight, bias, mode, align_corners, slope, *_):
    return reference.upsample_concat_conv2d_relu(x, skip, weight, bias, mode, not align_corners, slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("fault", [swapped_concat, other_corners])
def test_a_faulty_decoder_is_caught_where_it_begins(fault: Callable, dtype, x, monkeypatch):
    model, plain = pair()
    monkeypatch.setattr(forward, "reference", Faulty(reference, upsample_concat_conv2d_relu=fault))
    report = fastunet.verify(model, plain, x, dtype=dtype, deterministic=False)
    assert report.first_failure is not None and report.first_failure.name == "ups.0.conv.net.0", str(report)


def test_a_pool_off_by_one_is_caught(x, monkeypatch):
    model, plain = pair()
    pool = F.max_pool2d
    monkeypatch.setattr(forward, "F", Faulty(F, max_pool2d=lambda x, size: pool(x.roll(1, 3), size)))
    report = fastunet.verify(model, plain, x)
    assert report.first_failure is not None and report.first_failure.name == "downs.0.pool", str(report)


def shifted(right: Callable, x, weight, bias, **options):
    return right(x, weight.roll(1, 3), bias, **options)


def biasless(right: Callable, x, weight, bias, **options):
    return right(x, weight, None, **options)


def short(right: Callable, x, weight, bias, **options):
    return right(x[:, :-1], weight[:, :-1], bias, **options)


def one_row_of_the_next_tile(right: Callable, x, weight, bias, **options):
    y, pooled = right(x, weight, bias, **options)
    if x.shape[2] > 4:
        y[:, :, 4] = right(x[:, :, 4:], weight, bias, **options)[0][:, :, 0]
    return y, pooled


def late_pool(right: Callable, x, weight, bias, **options):
    y, _ = right(x, weight, bias, **options)
    return y, F.max_pool2d(y.roll(1, 3), 2)


def rolled(right: Callable, x, skip, weight, bias, **options):
    return right(x, skip, weight.roll(1, 1), bias, **options)


def cornered(right: Callable, x, skip, weight, bias, *, align_corners, **options):
    return right(x, skip, weight, bias, align_corners=not align_corners, **options)


def biasless_head(right: Callable, x, weight, bias, head, _, **options):
    return right(x, weight, bias, head, None, **options)


@pytest.mark.parametrize(
    "launcher, fault, first",
    [
        ("stem_fwd", shifted, "downs.0.conv.net.0"),
        ("stem_fwd", biasless, "downs.0.conv.net.0"),
        ("conv_pool_fwd", short, "downs.0.conv.net.2"),
        ("conv_pool_fwd", one_row_of_the_next_tile, "downs.0.conv.net.2"),
        ("conv_pool_fwd", late_pool, "downs.0.pool"),
        ("upconcat_conv3x3_fwd", rolled, "ups.0.conv.net.0"),
        ("upconcat_conv3x3_fwd", cornered, "ups.0.conv.net.0"),
        ("conv_head_fwd", biasless_head, "logits, with the head in one pass"),
        ("conv_fwd", biasless, "bottleneck.net.0"),  # whatever has more channels than the stem takes
    ],
)
def test_a_faulty_kernel_is_caught_where_it_is(launcher, fault: Callable, first, x, device, monkeypatch):
    model, plain = (network.to(device) for network in pair())
    right = getattr(kernels, launcher)
    monkeypatch.setattr(kernels, launcher, lambda *tensors, **options: fault(right, *tensors, **options))
    with dispatch.forced("triton"):
        inputs = x[..., :8, :10].to(device)
        report = fastunet.verify(model, plain, inputs, dtype=torch.float16, gradients=False, deterministic=False)
    assert report.first_failure is not None and report.first_failure.name == first, str(report)
    assert report.first_failure.implementation == "triton"
