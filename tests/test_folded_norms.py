"""Batch norms of fixed statistics in 16 bits: factors beside the weights, which are not rounded for them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastunet import FastUNet, UNetConfig, dispatch
from fastunet.parity import compare
from fastunet.parity.rule import truncating_stages
from fastunet.reference import UNet

CONFIG = UNetConfig(2, 2, (6, 8, 10), align_corners=False, norm="batch")
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
EITHER = pytest.mark.parametrize("forced", ["torch", "triton"])


@pytest.fixture
def pair(seed, device):
    """A FastUNet and a reference of the same weights and statistics, in eval mode; nothing wants gradients."""
    model = FastUNet.from_config(CONFIG).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    reference = UNet.from_config(CONFIG).requires_grad_(False)
    reference.load_state_dict(model.state_dict())
    return model.to(device).eval(), reference.to(device).eval()


def layers(dtype, got):
    """For the rule: of the outputs of a network, which is some twenty operators deep."""
    return truncating_stages(20, dtype, not got.is_cuda)


@HALVES
@EITHER
def test_weights_stay_as_they_are(forced, dtype, pair, device):
    model = pair[0].to(dtype)
    with dispatch.forced(forced):
        model(torch.randn(1, 2, 12, 16, device=device, dtype=dtype))
    convs = [conv for conv in model.modules() if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)]
    for conv in convs:
        ((weight, bias),) = model._prepared[conv].weights.values()
        assert torch.equal(weight, conv.weight) and bias is not None
        assert bias.shape == (2, len(weight)) and bias.dtype == torch.float32


@HALVES
@EITHER
def test_as_near_float64_as_plain_pytorch(forced, dtype, pair, device):
    model, reference = (m.to(dtype) for m in pair)
    x = torch.randn(2, 2, 13, 18, device=device, dtype=dtype)
    truth = copy.deepcopy(reference).double()(x.double())
    with dispatch.forced(forced):
        got = model(x)
    parity = compare(got, reference(x), truth, stages=layers(dtype, got))
    assert parity.ok, str(parity)


@HALVES
@EITHER
def test_the_gradient_of_the_input(forced, dtype, pair, device):
    """It wants the factors in the weights."""
    model, reference = (m.to(dtype) for m in pair)
    x = torch.randn(1, 2, 12, 16, device=device, dtype=dtype)
    exact = copy.deepcopy(reference).double()
    grads = []
    with dispatch.forced(forced):
        before = model(x)
        for network, image in ((model, x), (reference, x), (exact, x.double())):
            image = image.clone().requires_grad_()
            direction = torch.linspace(-1, 1, before.numel(), device=device).view_as(before)
            grads += torch.autograd.grad(network(image), image, direction.to(image.dtype))
        assert torch.equal(model(x), before)  # with factors again
    # The sides of some ReLUs differ between the three, so their gradients do: a bound, not the rule.
    off, theirs = ((g.double() - grads[2]).norm() / grads[2].norm() for g in grads[:2])
    assert off < max(4 * theirs, 0.1), (off, theirs)


@EITHER
def test_under_autocast(forced, pair, device):
    model, reference = pair
    x = torch.randn(1, 2, 12, 16, device=device)
    truth = copy.deepcopy(reference).double()(x.double())
    with torch.autocast(device, torch.bfloat16), dispatch.forced(forced):
        got, baseline = model(x), reference(x)
    assert got.dtype == torch.bfloat16
    # Both begin by rounding x and the weights, which the truth does not: a stage more.
    parity = compare(got, baseline, truth, stages=layers(torch.bfloat16, got) + 4)
    assert parity.ok, str(parity)


@EITHER
def test_in_compiled_code(forced, pair, device):
    model = pair[0].half()
    x = torch.randn(1, 2, 12, 16, device=device, dtype=torch.float16)
    with dispatch.forced(forced):
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), model(x))


def test_changed_statistics_are_seen(pair, device):
    model, x = pair[0].half(), torch.randn(1, 2, 12, 16, device=device, dtype=torch.float16)
    with dispatch.forced("triton"):
        before = model(x)
        model.downs[0].conv.net[1].running_var.mul_(2)  # type: ignore[union-attr, index]
        after = model(x)
        model.refresh()
        assert not torch.equal(before, after) and torch.equal(model(x), after)
