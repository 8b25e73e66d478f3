"""Plans of compiled kernels, whose launches go through Triton's own launcher: the pass's launches, and its bits."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.jit import JITFunction

from fastunet import FastUNet, dispatch
from fastunet.ops import operator
from fastunet.ops.recorder import recorded
from fastunet.prepared import laid_out

from ..conftest import CUDA
from .launches import machine

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(CUDA, reason="the machine stands in for a GPU"),
    pytest.mark.usefixtures("poisoned"),
]


@pytest.fixture(params=["triton", "hopper"])
def on_our_kernels(request, monkeypatch):
    monkeypatch.setattr(dispatch, "why_not_hopper", lambda device: None)
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device, dtype: None)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with dispatch.forced(request.param):
        yield


@pytest.fixture
def model(seed):
    return FastUNet(1, 2, (16, 64), norm="batch").half()


def images(height, width):
    return [torch.randn(1, 1, height, width).half() for _ in range(2)]


def test_a_forward_pass(on_our_kernels, model, seed, monkeypatch):
    model.eval()
    x, other = images(6, 20)  # of several tiles
    with torch.no_grad(), machine(seed) as launched:
        model._forward(x)  # lays out the weights
        _, plan = recorded(model._forward, [x], [*model.parameters(), *model.buffers(), *laid_out(model._prepared)])
        launched.clear()
        want = model._forward(other)
        own = launched.copy()
        launched.clear()
        monkeypatch.setattr(JITFunction, "run", None)  # which chooses a kernel by its arguments
        assert torch.equal(plan(other), want)
    assert launched == own and len({launch.name for launch in own}) > 2
    assert any(launch.grid != (1, 1, 1) for launch in own if launch.name == "_conv_fwd_kernel")


def test_a_training_step(on_our_kernels, model, seed, monkeypatch):
    """Of operators and gradients that each go by a plan of their own."""
    x, other = images(6, 8)

    def step(image):
        model.zero_grad()
        y = model(image)
        y.square().mean().backward()
        return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    monkeypatch.setattr(operator, "_on_gpu", lambda x: True)
    with machine(seed) as launched:
        want = step(other)
        own = launched.copy()
        step(x)  # the second of its kind, of which plans are made
        launched.clear()
        monkeypatch.setattr(JITFunction, "run", None)
        got = step(other)
    assert launched == own and len({launch.name for launch in own}) > 5
    assert len(got) == len(want) and all(map(torch.equal, got, want))
