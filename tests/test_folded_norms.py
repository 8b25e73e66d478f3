"""Batch norms of fixed statistics in 16 bits: factors beside the weights, which are not rounded for them."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

import fastunet
from fastunet import FastUNet, UNetConfig, dispatch, ops, reference
from fastunet.parity import compare
from fastunet.prepared import fold
from fastunet.reference import UNet
from fastunet.trace import trace

CONFIG = UNetConfig(2, 2, (6, 8, 10), align_corners=False, norm="batch")
SMOOTH = dataclasses.replace(CONFIG, activation="leaky_relu", negative_slope=0.99, downsample="stride")
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
EITHER = pytest.mark.parametrize("forced", ["torch", "triton"])


def make_pair(config, device):
    """A FastUNet and a reference of the same weights and statistics, in eval mode; nothing wants gradients."""
    model = FastUNet.from_config(config).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    reference = UNet.from_config(config).requires_grad_(False)
    reference.load_state_dict(model.state_dict())
    return model.to(device).eval(), reference.to(device).eval()


@pytest.fixture
def pair(seed, device):
    return make_pair(CONFIG, device)


@pytest.fixture
def smooth_pair(seed, device):
    """Almost linear: which side of 0 a value is on, or which of four is the largest, changes no gradient by much."""
    return make_pair(SMOOTH, device)


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
def test_each_layer_and_the_output_hold(forced, dtype, pair, device):
    (model, plain), x = pair, torch.randn(2, 2, 13, 18, device=device)
    with dispatch.forced(forced):
        report = fastunet.verify(model, plain, x, dtype=dtype, gradients=False, deterministic=False)
    assert report.ok, str(report)


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
            weight, bias = fold(conv.weight, conv.bias, norm, apart)
            y = ops.conv2d_relu(x, weight, bias)[:, :, 1:-1, 1:-1]  # of the border's sums the norm does not know
            held.append(compare(y, truth.to(dtype), truth).ok)
    assert held == [True, False]


@pytest.mark.parametrize(
    "how, forced, dtype",
    [
        ("half", "torch", torch.float16),
        ("half", "triton", torch.bfloat16),
        ("autocast", "triton", torch.float16),
        ("compiled", "torch", torch.bfloat16),
    ],
    ids=str,
)
def test_a_head_that_trains_behind_frozen_norms(how, forced, dtype, smooth_pair, device):
    model, exact = smooth_pair
    model, x = model if how == "autocast" else model.to(dtype), torch.randn(1, 2, 12, 16, device=device)
    x = x if how == "autocast" else x.to(dtype)
    for network in smooth_pair:
        network.head.requires_grad_(True)
    torch.compiler.reset()
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if how == "compiled" else model
    with dispatch.forced(forced), torch.autocast(device, dtype, enabled=how == "autocast"):
        y = call(x)
    direction = torch.randn(y.shape, device=device).to(dtype)
    (got,) = torch.autograd.grad(y, model.head.weight, direction.to(y.dtype))
    (want,) = torch.autograd.grad(exact(x.float()), exact.head.weight, direction.float())
    assert (got.float() - want).norm() < 0.1 * want.norm()  # that there is one, and of the right map


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

    def plain(*tensors):
        """Each as PyTorch alone would, with its roundings."""
        x, weight, small, both, head, bias = tensors
        conv, wide = torch.nn.functional.conv2d, torch.promote_types(x.dtype, torch.float32)
        factor, added = (t.to(wide)[:, None, None] for t in bias)
        one = (conv(x, weight, padding=1).to(wide) * factor + added).relu().to(x.dtype)
        joined = reference.upsample_concat(small, x, "bilinear", True)
        return {
            "conv": one,
            "pool": torch.nn.functional.max_pool2d(one, 2),
            "strided": one[:, :, 1:-1:2, 1:-1:2],
            "head": conv(one, head),
            "two sources": (conv(joined, both, padding=1).to(wide) * factor + added).relu().to(x.dtype),
        }

    tensors = x, weight, small, both, head, bias
    baseline, truth = plain(*tensors), plain(*(t.double() for t in tensors))
    with dispatch.forced(forced):
        y, pooled = ops.conv2d_relu(x, weight, bias, pool=True)
        found = {
            "conv": y,
            "pool": pooled,
            "strided": ops.conv2d_relu(x, weight, bias, stride=(2, 2), padding="valid"),
            "head": ops.conv2d_relu_head(x, weight, bias, head),
            "two sources": ops.upsample_concat_conv2d_relu(small, x, both, bias),
        }
    for name, got in found.items():
        assert got.dtype == x_dtype
        if x_dtype == torch.float64:  # of which no truth is nearer than the baseline
            torch.testing.assert_close(got, baseline[name], rtol=0, atol=1e-13)
            continue
        parity = compare(got, baseline[name], truth[name], stages=2)
        assert parity.ok, f"{name}: {parity}"


@HALVES
@EITHER
def test_the_gradient_of_the_input(forced, dtype, smooth_pair, device):
    """It wants the factors in the weights."""
    model, reference = (m.to(dtype) for m in smooth_pair)
    x = torch.randn(1, 2, 12, 16, device=device, dtype=dtype)
    exact = copy.deepcopy(reference).double()
    grads = []
    with dispatch.forced(forced):
        before = model(x)
        direction = torch.randn_like(before)
        for network, image in ((model, x), (reference, x), (exact, x.double())):
            image = image.clone().requires_grad_()
            grads += torch.autograd.grad(network(image), image, direction.to(image.dtype))
        assert torch.equal(model(x), before)  # with factors again
    parity = compare(*grads, stages=8 * len(trace(SMOOTH, 12, 16)))
    assert parity.ok, str(parity)


@EITHER
def test_under_autocast(forced, pair, device):
    """Of an image and convolutions that bfloat16 has, so that autocast rounds neither."""
    for network in pair:
        for conv in network.modules():
            if isinstance(conv, nn.Conv2d):
                for parameter in conv.parameters():
                    parameter.copy_(parameter.bfloat16())
    (model, reference), x = pair, torch.randn(1, 2, 12, 16, device=device).bfloat16().float()
    truth = copy.deepcopy(reference).double()(x.double())
    with torch.autocast(device, torch.bfloat16), dispatch.forced(forced):
        got, baseline = model(x), reference(x)
    assert got.dtype == torch.bfloat16
    parity = compare(got, baseline, truth, stages=len(trace(CONFIG, 12, 16)))
    assert parity.ok, str(parity)


@EITHER
def test_in_compiled_code(forced, pair, device):
    model = pair[0].half()
    x = torch.randn(1, 2, 12, 16, device=device, dtype=torch.float16)
    with dispatch.forced(forced):
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), model(x))


def test_changed_statistics_are_seen(smooth_pair, device):
    model, x = smooth_pair[0].half(), torch.randn(1, 2, 12, 16, device=device, dtype=torch.float16)
    with dispatch.forced("triton"):
        before = model(x)
        model.downs[0].conv.net[1].running_var.mul_(2)  # type: ignore[union-attr, index]
        after = model(x)
        model.refresh()
        assert not torch.equal(before, after) and torch.equal(model(x), after)
