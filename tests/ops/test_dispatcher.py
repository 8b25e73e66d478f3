"""Operators are called around torch's dispatcher where nobody would notice, and through it for everybody else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastunet import dispatch, ops
from fastunet.ops import forward


class Subclass(torch.Tensor):
    """Whoever has one wants to see what is done with it."""


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


@pytest.fixture
def given(seed, device):
    return torch.randn(1, 3, 5, 6, device=device), torch.randn(4, 3, 3, 3, device=device), torch.randn(4, device=device)


@pytest.fixture
def calls(monkeypatch):
    """Of the registered operator."""
    seen: list[str] = []
    registered = forward.conv2d_relu.registered

    def call(*arguments):
        seen.append("conv2d_relu")
        return registered(*arguments)

    monkeypatch.setattr(forward.conv2d_relu, "registered", call)
    return seen


def test_where_nobody_looks_on(given, calls):
    with dispatch.forced("triton"):
        with torch.no_grad():
            around = ops.conv2d_relu(*given)
        assert torch.equal(ops.conv2d_relu(*given), around)
        assert not calls
        with ops.watched():
            assert torch.equal(ops.conv2d_relu(*given), around)
        assert calls


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_gradients_are_those_of_the_registered_operator(implementation, given, calls):
    def gradients():
        wanted = [t.clone().requires_grad_() for t in given]
        y, pooled = ops.conv2d_relu(*wanted, pool=True)
        return torch.autograd.grad(y.square().sum() + pooled.sum(), wanted)

    with dispatch.forced(implementation):
        around = gradients()
        with ops.watched():
            through = gradients()
    assert all(map(torch.equal, around, through))


def test_gradients_that_nobody_wants_are_not_prepared(given, monkeypatch):
    def recorded(*_):
        raise AssertionError

    monkeypatch.setattr(forward.conv2d_relu, "with_gradients", recorded)
    with dispatch.forced("triton"):
        assert ops.conv2d_relu(*given).grad_fn is None


def test_a_node_of_the_graph_is_called_as_its_operator(given):
    with dispatch.forced("triton"):
        y = ops.conv2d_relu(given[0].requires_grad_(), *given[1:])
    assert y.grad_fn is not None and y.grad_fn.name() == "conv2d_reluBackward"


@torch.no_grad()
@pytest.mark.parametrize("who", [ops.watched, Functions, Dispatched, torch.autograd.forward_ad.dual_level])
def test_whoever_looks_on_sees_the_operator(who, given, calls):
    with dispatch.forced("triton"), who():
        ops.conv2d_relu(*given)
    assert calls


def test_a_default_device_is_nobody(given, calls, device):
    torch.set_default_device(device)
    try:
        with dispatch.forced("triton"):
            ops.conv2d_relu(*given)
    finally:
        torch.set_default_device(None)
    assert not calls


@torch.no_grad()
def test_subclasses_and_fakes_see_the_operator(given, calls):
    with dispatch.forced("triton"):
        x, weight, bias = given
        ops.conv2d_relu(x, weight.as_subclass(Subclass), bias)
        assert len(calls) == 1
        y = forward.conv2d_relu(*(t.to("meta") for t in given), 0.0, (1, 1), "same")
        assert len(calls) == 2 and y.device.type == "meta" and y.shape == (1, 4, 5, 6)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_has_the_operator(given):
    with dispatch.forced("triton"):
        traced: Any = torch.jit.trace(lambda x: ops.conv2d_relu(x, *given[1:]), given[0])
        x = torch.randn_like(given[0])
        assert "fastunet::conv2d_relu" in str(traced.graph)
        assert torch.equal(traced(x), ops.conv2d_relu(x, *given[1:]))
