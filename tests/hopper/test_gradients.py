"""Gradients of operators whose inputs' gradients the Hopper kernel gives, in the emulator."""

from __future__ import annotations

import pytest
import torch

from fastunet import dispatch
from fastunet.kernels import hopper

from ..ops.cases import CASES, outputs
from ..ops.test_gradients import hold_by_the_rule, hold_in_16_bits

pytestmark = pytest.mark.usefixtures("poisoned", "emulate")

# By name: shapes of channels that TMA takes.
LAYERS = {
    "conv2d_leaky_pool": [(2, 8, 5, 6), (16, 8, 3, 3), (16,)],
    "conv1x1_linear": [(2, 8, 3, 4), (16, 8, 1, 1)],
    "upsample_concat_conv2d_relu": [(2, 16, 2, 3), (2, 8, 5, 6), (8, 24, 3, 3), (8,)],
    "replicated": [(2, 8, 2, 3), (2, 8, 6, 9), (8, 16, 3, 3), (8,)],
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Channels of the gradients that Hopper's kernel gave."""
    seen: list[int] = []
    dgrad = hopper.conv_dgrad
    monkeypatch.setattr(dispatch, "why_not_hopper", lambda device: None)
    monkeypatch.setattr(hopper, "conv_dgrad", lambda g, w, **o: (seen.append(w.shape[1]), dgrad(g, w, **o))[1])
    return seen


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_of_an_operator(dtype, name, launched, seed):
    """By the rule; all else is PyTorch's."""
    op, plain, _ = CASES[name]
    inputs = [(torch.randn(shape) / max(1, len(shape) - 2)).to(dtype) for shape in LAYERS[name]]
    hold_in_16_bits(op, plain, inputs, "torch", dgrad="hopper")
    sources = [shape for shape in LAYERS[name] if len(shape) == 4][:-1]
    assert launched == [channels for _, channels, _, _ in sources]


@pytest.mark.parametrize("name", ["conv2d_relu", "strided", "unpadded", "conv_transpose2x2"])
def test_what_it_cannot_serve_is_the_portable_kernels(name, launched, seed):
    """Three channels, a stride, no padding, and a transposed convolution: by the rule."""
    op, plain, shapes = CASES[name]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    with dispatch.forced("torch"), dispatch.forced("hopper", "dgrad"):
        results = outputs(op(*inputs))
    cotangents = [torch.randn_like(y) for y in results]
    hold_by_the_rule(torch.autograd.grad(results, inputs, cotangents), plain, inputs, cotangents)
    assert not launched
