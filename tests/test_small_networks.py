"""A CPU leaves inference of small layers to plain PyTorch: they do not make good what an operator takes in Python."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastunet
from fastunet import FastUNet, UNetConfig, dispatch
from fastunet.reference import UNet
from fastunet.small import is_small
from fastunet.trace import trace

# With slopes that no seed makes a dead network of.
CONFIG = UNetConfig(1, 2, (4, 6), align_corners=False, norm="batch", activation="leaky_relu", negative_slope=0.9)
SMALL, LARGE = (1, 1, 8, 12), (4, 1, 16, 24)


def work(size):
    """Multiply-adds of a layer, on average, counted by hand of the weights and maps that are traced."""
    layers = trace(CONFIG, *size[2:], batch=size[0])
    return sum(layer.flops for layer in layers) / 2 / len(layers)


@pytest.fixture(autouse=True)
def between(monkeypatch, operators_for_small_networks):
    """One size is small, sixteen times the work is not; in 16 bits neither is."""
    assert 15 < work(LARGE) / work(SMALL) < 17
    monkeypatch.setattr("fastunet.small.LEAST_WORK", 4 * work(SMALL))
    monkeypatch.setattr("fastunet.small.LEAST_WORK_IN_16_BITS", work(SMALL))


@pytest.fixture
def pair(seed):
    model = FastUNet.from_config(CONFIG).eval()
    plain = UNet.from_config(CONFIG).eval()
    plain.load_state_dict(model.state_dict())
    return model, plain


@pytest.mark.parametrize("dtype, small", [(torch.float32, True), (torch.float64, True), (torch.bfloat16, False)])
def test_which_are_small(dtype, small):
    assert is_small(CONFIG, SMALL, dtype) == small and not is_small(CONFIG, LARGE, dtype)


@torch.no_grad()
@pytest.mark.parametrize("size, on_torch", [(SMALL, True), (LARGE, False)], ids=["small", "large"])
def test_what_runs(size, on_torch, pair):
    """Operators prepare weights."""
    (model, plain), x = pair, torch.randn(size)
    y = model(x)
    assert model.runs_on_plain_torch(x) == on_torch == (not model._prepared)
    assert y.is_contiguous(memory_format=torch.channels_last)
    if on_torch:
        assert torch.equal(y, plain(x))


@torch.no_grad()
def test_who_asks_gets_the_operators(pair):
    model, x = pair[0], torch.randn(SMALL)
    with dispatch.forced("torch"):
        assert not model.runs_on_plain_torch(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not model.runs_on_plain_torch(x)
    with fastunet.ops.watched():
        assert not model.runs_on_plain_torch(x)


def test_compiled_code_keeps_to_the_operators(pair):
    (model, plain), x = pair, torch.randn(SMALL)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    truth = copy.deepcopy(plain).double()
    with torch.no_grad():
        parity = fastunet.parity.compare(compiled(x), plain(x), truth(x.double()), stages=8)
    assert parity.ok, str(parity)


def test_verify_compares_operators_and_what_is_called(pair):
    model, plain = pair
    report = fastunet.verify(model, plain, torch.randn(SMALL))
    assert report.ok, str(report)
    named = {comparison.name: comparison for comparison in report.comparisons}
    assert named["logits, as it is called, unwatched"].implementation == "reference"
    assert "downs.0.conv.net.0" in named


def test_verify_sees_a_fault_of_what_is_called(pair, monkeypatch):
    model, plain = pair
    forward = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x: forward(self, x) * (1.01 if type(self) is FastUNet else 1))
    report = fastunet.verify(model, plain, torch.randn(SMALL), gradients=False, deterministic=False)
    assert not report.ok and report.first_failure is not None
    assert report.first_failure.name == "logits, as it is called, unwatched"


@pytest.mark.parametrize("size, words", [(SMALL, "with such small layers"), (LARGE, "the device is a CPU")])
def test_explain_says_why(size, words, pair):
    rows = fastunet.explain(pair[0], size).rows
    assert all(words in row.choice.reason for row in rows)
    assert ("small" in rows[0].choice.reason) == (size == SMALL)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_no_image_is_small(training, pair):
    model, x = pair[0].train(training), torch.zeros(0, 1, 8, 12, requires_grad=True)
    with torch.set_grad_enabled(training):
        y = model(x)
    assert y.shape == (0, 2, 8, 12)
    if training:
        y.sum().backward()


@torch.no_grad()
def test_sizes_that_a_tracer_does_not_know(pair):
    model, x = pair[0], torch.randn(SMALL)
    options: dict[str, Any] = {"tracing_mode": "symbolic", "_allow_non_fake_inputs": True}
    traced = make_fx(model, **options)(x)
    torch.testing.assert_close(traced(x), model(x))


@torch.no_grad()
def test_a_wrong_dtype_is_named(pair):
    with pytest.raises(ValueError, match=r"weight: expected x's dtype torch\.float64, got torch\.float32"):
        pair[0](torch.zeros(SMALL, dtype=torch.float64))
    with torch.autocast("cpu"), pytest.raises(ValueError, match=r"weight: expected x's dtype torch\.float64"):
        pair[0](torch.zeros(SMALL, dtype=torch.float64))


@torch.no_grad()
def test_a_replaced_layer_is_plain_torch_whatever_is_asked_for(pair):
    model, x = pair[0], torch.randn(SMALL)
    y = model(x)
    model.head = nn.Sequential(model.head)
    with dispatch.forced("triton"):
        assert torch.equal(model(x), y)


def test_verify_sees_them_in_the_model_itself_too(pair):
    """Whose layers are small in float32, and not in the working dtype."""
    model, plain = pair
    x = torch.randn(SMALL)
    with torch.no_grad(), fastunet.ops.watched():
        model(x)
    for network in pair:
        network.bottleneck.net[0].weight.data.mul_(1.5)  # into which a norm is folded
    report = fastunet.verify(model, plain, x, dtype=torch.bfloat16, gradients=False)
    failed = {check.name for check in report.checks if not check.ok}
    assert "the model itself, not a copy" in failed


def test_who_is_told_of_results_is_not_watched(pair):
    model, plain = pair
    seen = []
    report = fastunet.verify(
        model, plain, torch.randn(SMALL), on_result=lambda _: seen.append(fastunet.ops.is_watched())
    )
    assert report.ok and seen and not any(seen)


def test_verify_sees_weights_that_are_not_those_of_now(pair, monkeypatch):
    monkeypatch.setattr("fastunet.sources.Sources.are", lambda *_: True)
    model, plain = pair
    report = fastunet.verify(model, plain, torch.randn(SMALL), gradients=False)
    failed = {check.name for check in report.checks if not check.ok}
    assert {"after weights changed in place", "after a step of training"} <= failed
