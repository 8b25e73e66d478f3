"""``fastunet.verify`` catches deliberate faults, and says where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastunet
from fastunet import FastUNet, dispatch, kernels, reference
from fastunet.ops import backward, common, forward
from fastunet.parity.fuzz import randomise
from fastunet.reference import UNet
from fastunet.sources import Sources

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


def test_a_stale_folded_norm_is_caught(x, monkeypatch):
    model, plain = pair(norm="batch")
    fold = fastunet.model._fold
    monkeypatch.setattr(
        fastunet.model,
        "_fold",
        lambda w, b, norm, *rest: fold(w, b, norm and FreshNorm(norm, running_var=norm.running_var * 2), *rest),
    )
    report = fastunet.verify(model, plain, x)
    assert report.first_failure is not None and report.first_failure.name == "downs.0.conv.net.0", str(report)


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


def scaled(which: int, channels: int) -> Callable:
    """The backward of a convolution of so many input channels, one gradient of it a hundredth too large."""
    right = backward.convolution_backward

    def wrong(grad, x, weight, *others):
        found: list[Any] = list(right(grad, x, weight, *others))
        if weight.shape[1] == channels and found[which] is not None:
            found[which] = found[which] * 1.01
        return tuple(found)

    return wrong


def mask_forgotten(ctx, grad, grad_pooled, y, bias):
    return grad, None


def mask_of_negative(ctx, grad, grad_pooled, y, bias):
    return grad if y is None else torch.where(y > 0, torch.zeros_like(grad), grad), None


@pytest.mark.parametrize(
    "function, fault, first",
    [
        # The only convolution of 2 channels in is the first of all; the last of 8 reads the decoder's first source.
        ("convolution_backward", scaled(1, 2), "downs.0.conv.net.0.weight"),
        ("convolution_backward", scaled(0, 2), "input"),
        ("convolution_backward", scaled(1, 8), "ups.0.conv.net.0.weight"),
        ("_activation_backward", mask_forgotten, "ups.1.conv.net.2.bias"),
        ("_activation_backward", mask_of_negative, "ups.1.conv.net.2.bias"),
    ],
    ids=["first weight", "input", "decoder weight", "mask forgotten", "mask of the negative"],
)
def test_a_faulty_gradient_is_caught_where_it_is_found(function, fault, first, x, monkeypatch):
    model, plain = pair()
    monkeypatch.setattr(backward, function, fault)
    report = fastunet.verify(model, plain, x)
    assert not report.ok
    assert report.first_failure is not None
    assert (report.first_failure.kind, report.first_failure.name) == ("gradient", first), str(report)


def test_a_gradient_that_does_not_repeat_is_caught(x, monkeypatch):
    model, plain = pair()
    right, calls = backward.convolution_backward, []

    def other_each_time(*args):
        calls.append(0)
        return tuple(None if g is None else g * (1 + 1e-6 * len(calls)) for g in right(*args))

    monkeypatch.setattr(backward, "convolution_backward", other_each_time)
    report = fastunet.verify(model, plain, x)
    assert "gradients, second run" in {check.name for check in report.checks if not check.ok}, str(report)


def test_a_missing_gradient_is_caught(x, monkeypatch):
    model, plain = pair()
    right = backward.convolution_backward

    def forgetful(grad, x, weight, *others):
        found = right(grad, x, weight, *others)
        return (found[0], None, None) if weight.shape[-1] == 1 else found  # the head's

    monkeypatch.setattr(backward, "convolution_backward", forgetful)
    report = fastunet.verify(model, plain, x, deterministic=False)
    assert report.first_failure is not None
    assert report.first_failure.name == "head.bias", str(report)
    assert report.first_failure.parity.reason == "the candidate has no gradient"
    # A reference that asks for none does not hide it.
    assert not fastunet.verify(model, plain.requires_grad_(False), x, deterministic=False).ok


class Otherwise(FastUNet):
    """Right as long as no gradient is wanted."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 1 if torch.is_grad_enabled() else y


def test_the_forward_pass_of_training_is_compared_too(x):
    model, plain = pair()
    model.__class__ = Otherwise
    report = fastunet.verify(model, plain, x)
    assert report.first_failure is not None and report.first_failure.name == "logits with gradients", str(report)


def test_weights_prepared_once_and_for_all_are_caught(x, monkeypatch):
    model, plain = pair(norm="batch")
    monkeypatch.setattr(Sources, "are", lambda *_: True)
    report = fastunet.verify(model, plain, x)
    broken = {check.name for check in report.checks if not check.ok}
    assert "after weights changed in place" in broken and "the model itself, not a copy" not in broken, str(report)


def test_weights_prepared_for_other_statistics_are_caught(x, monkeypatch):
    """A cache that looks at the convolution alone: the norm folded into it is stale after a step of training."""
    model, plain = pair(norm="batch")
    right = Sources.are

    def blind(self, tensors):
        known = self._seen
        self._seen = known[:2]
        try:
            return right(self, tensors[:2])
        finally:
            self._seen = known

    monkeypatch.setattr(Sources, "are", blind)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        report = fastunet.verify(model, plain, x, dtype=dtype)
        broken = {check.name for check in report.checks if not check.ok}
        assert broken == {
            "after norms changed in place",
            "after statistics changed in place",
            "after a step of training",
        }, str(report)


def test_what_trains_on_a_cpu_is_the_reference_itself(x):
    model, plain = pair()
    for network in (model, plain):
        network(x).square().mean().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)
    assert any(what.startswith("what trains on a CPU") for what in fastunet.verify(model, plain, x).not_compared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_runs_when_nobody_looks_on_is_compared_too(dtype, x, monkeypatch):
    model, plain = pair()
    right = forward.upsample_concat_conv2d_relu_torch
    monkeypatch.setattr(
        forward,
        "upsample_concat_conv2d_relu_torch",
        lambda *tensors: right(*tensors) * (1 if common._watched.get() or torch.is_grad_enabled() else 1.5),
    )
    report = fastunet.verify(model, plain, x, dtype=dtype, deterministic=False)
    assert [check.name for check in report.checks if not check.ok] == ["as it is called, unwatched"], str(report)


def test_a_model_with_stale_weights_is_caught_itself(x):
    model, plain = pair()
    with torch.no_grad():
        model(x)
    model.get_parameter("ups.1.conv.net.2.weight").data.fill_(1)  # which no version counts
    plain.load_state_dict(model.state_dict())
    for dtype in (torch.float32, torch.float16):  # of a cast copy too
        report = fastunet.verify(model, plain, x, dtype=dtype)
        assert [check.name for check in report.checks if not check.ok] == ["the model itself, not a copy"], str(report)
    model.refresh()
    assert fastunet.verify(model, plain, x).ok


def test_a_model_that_overflows_does_not_hold(x):
    model, plain = pair()
    with torch.no_grad():
        for network in (model, plain):
            network.head.weight.fill_(6e4)
            network.get_parameter("head.bias").fill_(6.5e4)
    report = fastunet.verify(model, plain, x, dtype=torch.float16, gradients=False)
    assert "finite output" in {check.name for check in report.checks if not check.ok}, str(report)
    with pytest.raises(ValueError, match=r"inputs: expected values within the range of torch.float16"):
        fastunet.verify(model, plain, x * 1e6, dtype=torch.float16)
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(ValueError, match=r"model: expected finite weights in torch.float16, 'head.weight' holds"):
        fastunet.verify(model, plain, x, dtype=torch.float16)


def test_a_map_that_almost_died_hides_no_fault_elsewhere(x, monkeypatch):
    """Its own errors are large beside it; those of what is made of its skip are not."""
    model, plain = pair()
    with torch.no_grad():
        plain.bottleneck.net[2].bias.fill_(0)  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue, reportAttributeAccessIssue]
        largest = plain.bottleneck.net[2](plain.bottleneck.net[:2](_before_bottleneck(plain, x))).max()
        plain.bottleneck.net[2].bias.fill_(1e-6 - largest)  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue, reportAttributeAccessIssue]
    model.load_state_dict(plain.state_dict())
    assert fastunet.verify(model, plain, x).ok

    def louder(*arguments):
        return reference.upsample_concat_conv2d_relu(*arguments) * 1.05

    monkeypatch.setattr(forward, "reference", Faulty(reference, upsample_concat_conv2d_relu=louder))
    report = fastunet.verify(model, plain, x)
    assert report.first_failure is not None and report.first_failure.name.startswith("ups.0"), str(report)


def _before_bottleneck(plain: UNet, x: Tensor) -> Tensor:
    for down in plain.downs:
        x, _ = down(x)
    return x


@pytest.mark.parametrize(
    "name, forward",
    [
        ("second run", lambda y, calls: y + calls),
        ("every element written", lambda y, calls: torch.where(torch.rand(y.shape) < 0.1, torch.empty_like(y), y)),
    ],
)
def test_a_result_that_does_not_repeat_is_caught(name, forward, x):
    model, plain = pair()

    class Unsteady(FastUNet):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Unsteady.calls += 1
            return forward(super().forward(x), Unsteady.calls)

    model.__class__ = Unsteady
    report = fastunet.verify(model, plain, x)
    assert name in {check.name for check in report.checks if not check.ok}, str(report)


class FreshNorm:
    """A batch norm's attributes, some replaced."""

    def __init__(self, norm: nn.BatchNorm2d, **others: Tensor) -> None:
        for name in ("weight", "bias", "running_mean", "running_var", "eps"):
            setattr(self, name, others.get(name, getattr(norm, name)))
