"""Gradients of operators whose inputs' gradients the Hopper kernel gives, in the emulator."""

from __future__ import annotations

import pytest
import torch

from fastunet import dispatch, ops
from fastunet.kernels import hopper

from ..ops.cases import CASES, outputs

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
def test_of_an_operator(name, launched, seed):
    """All gradients are PyTorch's, of the same forward pass in fp16, but for roundings."""
    op, _, _ = CASES[name]
    inputs = [(torch.randn(shape) / 4).half().requires_grad_() for shape in LAYERS[name]]
    with dispatch.forced("torch"):
        results = outputs(op(*inputs))
        cotangents = [torch.randn_like(y) for y in results]
        expected = torch.autograd.grad(results, inputs, cotangents)
        with dispatch.forced("hopper", "dgrad"):
            results = outputs(op(*inputs))
    found = torch.autograd.grad(results, inputs, cotangents)
    sources = [t for t, shape in zip(inputs, LAYERS[name], strict=True) if len(shape) == 4][:-1]
    assert launched == [source.shape[1] for source in sources]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 4 * torch.finfo(a.dtype).eps * b.abs().max()


def test_what_it_cannot_serve_is_the_portable_kernels(launched, seed):
    """Three channels, a stride, and a transposed convolution."""
    x, weight = (torch.randn(*shape, requires_grad=True) for shape in ((1, 3, 4, 6), (8, 3, 3, 3)))
    up = torch.randn(8, 8, 2, 2, requires_grad=True)
    with dispatch.forced("torch"), dispatch.forced("hopper", "dgrad"):
        y = ops.conv2d_relu(ops.conv2d_relu(x, weight), weight.new_ones(8, 8, 3, 3), stride=(2, 2))
        found = torch.autograd.grad(ops.conv_transpose2x2(y, up).sum(), (x, weight, up))
    assert not launched and all(g.isfinite().all() for g in found)
