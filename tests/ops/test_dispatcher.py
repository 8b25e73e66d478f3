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
        assert not calls
        assert torch.equal(ops.conv2d_relu(*given), around)
        assert calls


@torch.no_grad()
@pytest.mark.parametrize("who", [ops.watched, Functions, Dispatched, torch.enable_grad])
def test_whoever_looks_on_sees_the_operator(who, given, calls):
    with dispatch.forced("triton"), who():
        ops.conv2d_relu(*given)
    assert calls


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
