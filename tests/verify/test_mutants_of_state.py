"""``fastunet.verify`` catches what depends on the call: stale weights, other results the second time, overflow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastunet
from fastunet import FastUNet, dispatch, kernels, reference
from fastunet.ops import forward, operator
from fastunet.reference import UNet
from fastunet.sources import Sources

from .networks import Faulty, pair


def test_a_stale_folded_norm_is_caught(x, monkeypatch):
    model, plain = pair(norm="batch")
    fold = fastunet.prepared.fold
    monkeypatch.setattr(
        fastunet.prepared,
        "fold",
        lambda w, b, norm, *rest: fold(w, b, norm and FreshNorm(norm, running_var=norm.running_var * 2), *rest),
    )
    report = fastunet.verify(model, plain, x)
    assert report.first_failure is not None and report.first_failure.name == "downs.0.conv.net.0", str(report)


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
        lambda *tensors: right(*tensors) * (1 if operator.is_watched() or torch.is_grad_enabled() else 1.5),
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


def test_an_element_that_the_head_in_one_pass_leaves_out_is_caught(x, device, monkeypatch):
    model, plain = (network.to(device) for network in pair())
    right = kernels.conv_head_fwd

    def incomplete(*tensors, **options):
        logits = right(*tensors, **options)
        if torch.are_deterministic_algorithms_enabled():  # as memory is filled with NaN in no other mode
            logits[..., 0] = torch.nan
        return logits

    monkeypatch.setattr(kernels, "conv_head_fwd", incomplete)
    with dispatch.forced("triton"):
        report = fastunet.verify(model, plain, x[..., :8, :10].to(device), gradients=False)
    assert [check.name for check in report.checks if not check.ok] == ["in one pass, every element written"], str(
        report
    )


class FreshNorm:
    """A batch norm's attributes, some replaced."""

    def __init__(self, norm: nn.BatchNorm2d, **others: Tensor) -> None:
        for name in ("weight", "bias", "running_mean", "running_var", "eps"):
            setattr(self, name, others.get(name, getattr(norm, name)))
