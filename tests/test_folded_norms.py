"""Batch norms of fixed statistics in 16 bits: factors beside the weights, which are not rounded for them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from fastunet import FastUNet, UNetConfig, dispatch, ops, reference
from fastunet.model import _fold
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
def test_a_layer_of_large_sums_is_rounded_once(dtype, pair, device):
    """Whose norm leaves little of them: with factors in the weights it breaks the rule."""
    model = pair[0].to(dtype)
    conv, norm = model.downs[0].conv.net[:2]
    x = (torch.rand(1, 2, 12, 16, device=device) + 8).to(dtype)
    sums = torch.nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double())
    norm.running_mean.copy_(sums.mean((0, 2, 3)))
    norm.running_var.copy_(sums.var((0, 2, 3)))
    exact = copy.deepcopy(conv).double(), copy.deepcopy(norm).double()
    truth = exact[1](exact[0](x.double())).relu()[:, :, 1:-1, 1:-1]
    held = []
    with dispatch.forced("triton"):
        for apart in (True, False):
            weight, bias = _fold(conv.weight, conv.bias, norm, apart)
            y = ops.conv2d_relu(x, weight, bias)[:, :, 1:-1, 1:-1]  # of the border's sums the norm does not know
            held.append(compare(y, truth.to(dtype), truth, stages=truncating_stages(1, dtype, not y.is_cuda)).ok)
    assert held == [True, False]


@HALVES
@EITHER
@pytest.mark.parametrize("how", ["half", "autocast", "compiled"])
def test_a_head_that_trains_behind_frozen_norms(how, forced, dtype, pair, device):
    model, exact = pair
    model, x = model if how == "autocast" else model.to(dtype), torch.randn(1, 2, 12, 16, device=device)
    x = x if how == "autocast" else x.to(dtype)
    for network in pair:
        network.head.requires_grad_(True)
    torch.compiler.reset()
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if how == "compiled" else model
    with dispatch.forced(forced), torch.autocast(device, dtype, enabled=how == "autocast"):
        y = call(x)
    y.float().square().sum().backward()
    exact(x.float()).square().sum().backward()
    got, want = model.head.weight.grad, exact.head.weight.grad
    assert got is not None and want is not None and (got.float() - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize(
    "forced, x_dtype, dtype",
    [
        *itertools.product(("torch", "triton"), [torch.float16], [torch.float16, torch.float32]),
        *itertools.product(("torch", "triton"), [torch.float32], [torch.float32]),
        *itertools.product(("torch",), [torch.float64], [torch.float32, torch.float64]),
    ],
    ids=str,
)
def test_operators_take_factors(forced, x_dtype, dtype, seed, device):
    """Of float32 or of x's dtype."""
    x, weight = torch.randn(2, 3, 6, 7, device=device), torch.randn(4, 3, 3, 3, device=device) / 5
    small, both = torch.randn(2, 2, 3, 4, device=device), torch.randn(4, 5, 3, 3, device=device) / 7
    bias, head = torch.randn(2, 4, device=device), torch.randn(2, 4, 1, 1, device=device)
    x, weight, small, both, head = (t.to(x_dtype) for t in (x, weight, small, both, head))
    bias = bias.to(dtype)
    factor, added = (t.double()[:, None, None] for t in bias)
    conv = torch.nn.functional.conv2d
    of_one = (conv(x.double(), weight.double(), padding=1) * factor + added).relu()
    joined = reference.upsample_concat(small.double(), x.double(), "bilinear", True)
    of_two = (conv(joined, both.double(), padding=1) * factor + added).relu()
    with dispatch.forced(forced):
        y, pooled = ops.conv2d_relu(x, weight, bias, pool=True)
        found = {
            "conv": (y, of_one),
            "pool": (pooled, torch.nn.functional.max_pool2d(of_one, 2)),
            "strided": (ops.conv2d_relu(x, weight, bias, stride=(2, 2), padding="valid"), of_one[:, :, 1:-1:2, 1:-1:2]),
            "head": (ops.conv2d_relu_head(x, weight, bias, head), conv(of_one, head.double())),
            "two sources": (ops.upsample_concat_conv2d_relu(small, x, both, bias), of_two),
        }
    for name, (got, true) in found.items():
        assert got.dtype == x_dtype
        parity = compare(got, true.to(x_dtype), true, stages=4)
        assert parity.ok, f"{name}: {parity}"


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
