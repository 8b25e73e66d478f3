"""``fastunet.verify`` catches deliberate faults of the backward pass, and says where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastunet
from fastunet import FastUNet
from fastunet.ops import backward

from .networks import pair


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
