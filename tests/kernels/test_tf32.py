"""float32 factors are rounded to tf32, to the nearest: tensor cores truncate, which makes every map too small."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from fastunet import FastUNet, dispatch, kernels, reference
from fastunet.kernels import hopper
from fastunet.kernels.launch import launch as plain_launch
from fastunet.parity.rule import TF32_EPS
from fastunet.prepared import laid_out

from ..conftest import CUDA
from ..ptx.launches import machine
from .test_backward import gradient
from .test_head import with_head

pytestmark = [pytest.mark.compiled, pytest.mark.usefixtures("poisoned")]


@pytest.fixture(params=[kernels, hopper], ids=["portable", "hopper"])
def launchers(request):
    """Either's, of a GPU that has them."""
    obstacle = dispatch.why_not_hopper(torch.device("cuda")) if CUDA and request.param is hopper else None
    return pytest.skip(obstacle) if obstacle else request.param


UPSAMPLED = {"mode": "bilinear", "align_corners": True, "slope": 1.0}


def scale(y, truth):
    """By how much y is larger than the truth, in units of tf32's eps: truncated factors make that -0.72."""
    return ((y - truth) * truth).sum().item() / truth.square().sum().item() / TF32_EPS


def test_maps_are_not_smaller(launchers, make):
    x, weight = make("tf32", 1, 40, 9, 12), make("tf32", 64, 40, 3, 3, fan_in=360)
    wide = x.double(), weight.double()
    assert abs(scale(launchers.conv_fwd(x, weight, None, slope=1.0), F.conv2d(*wide, padding=1))) < 0.1
    head = make("tf32", 8, 64, 1, 1, fan_in=64)
    truth = with_head(*wide, None, head.double(), None, 1.0)
    assert abs(scale(launchers.conv_head_fwd(x, weight, None, head, None, slope=1.0), truth)) < 0.1
    turned = make("tf32", 40, 16, 2, 2, fan_in=40)
    truth = F.conv_transpose2d(x.double(), turned.double(), stride=2)
    assert abs(scale(launchers.conv_transpose_fwd(x, turned, None), truth)) < 0.1
    g = make("tf32", 1, 64, 9, 12)
    truth = F.conv_transpose2d(g.double(), weight.double(), padding=1)
    assert abs(scale(launchers.conv_dgrad(g, weight), truth)) < 0.1
    low, skip = make("tf32", 1, 24, 4, 6), make("tf32", 1, 16, 9, 12)
    sources = low.double(), skip.double(), weight.double()
    truth = reference.upsample_concat_conv2d_relu(*sources, None, *UPSAMPLED.values())
    for launch in (launchers.upconcat_conv3x3_fwd, launchers.upconcat_conv3x3_commuted_fwd):
        assert abs(scale(launch(low, skip, weight, None, **UPSAMPLED), truth)) < 0.1


def test_nor_is_the_first_one(make):
    x, weight = make("tf32", 1, 3, 16, 16), make("tf32", 64, 3, 3, 3, fan_in=27)
    truth = F.conv2d(x.double(), weight.double(), padding=1)
    assert abs(scale(kernels.stem_fwd(x, weight, None, slope=1.0), truth)) < 0.1


def test_of_the_gradient_of_a_weight_one_factor_is_truncated(make):
    """It is not handed on from layer to layer."""
    x, g = make("tf32", 2, 40, 9, 12), make("tf32", 2, 64, 9, 12)
    weight = make("tf32", 64, 40, 3, 3).double()
    truth = gradient(lambda x, weight: F.conv2d(x, weight, padding=1), 1)(g.double(), x.double(), weight)
    assert -0.5 < scale(kernels.conv_wgrad(g, [x], 3, bias=False)[0], truth) < 0.1


def test_nan_and_infinity_stay(make):
    """Of NaN with all bits set, too, as a GPU makes it."""
    weight = make("tf32", 3, 5, 3, 3)
    flat = weight.view(-1)
    flat[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    flat[4:6] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    rounded = kernels.tf32.rounded_weight(weight, tf32=True).view(-1)
    assert torch.equal(rounded.isnan(), flat.isnan()) and torch.equal(rounded[[0, 1, 3]], flat[[0, 1, 3]])
    assert ((rounded - flat)[6:].abs() <= flat[6:].abs() * TF32_EPS / 2).all()
    assert not (rounded[6:].view(torch.int32) & 0x1FFF).any()
    assert kernels.tf32.rounded_weight(weight, tf32=False) is weight


def roundings(launched):
    return sum(launch.name == "_round_kernel" for launch in launched)


@pytest.fixture
def on_our_kernels(monkeypatch):
    if CUDA:
        pytest.skip("launches are counted where they are made on a CPU")
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device, dtype: None)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with dispatch.forced("triton"):
        yield


def test_a_models_weights_are_rounded_once(on_our_kernels, seed, monkeypatch):
    model, x = FastUNet(1, 2, (8, 16)).eval(), torch.randn(1, 1, 8, 8)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with torch.no_grad(), machine(seed) as launched:
        first = model(x)
        assert roundings(launched) == len(model._prepared)
        launched.clear()
        assert torch.equal(model(x), first) and not roundings(launched)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        launched.clear()
        exact = model(x)
    assert not roundings(launched) and not torch.equal(exact, first)
    assert sum(map(kernels.tf32.is_rounded, laid_out(model._prepared))) == len(model._prepared)


def test_a_layers_weights_are_rounded_in_each_step_of_training(on_our_kernels, seed, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model, x = FastUNet(1, 2, (8, 16)), torch.randn(1, 1, 8, 8)
    convs = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    with machine(seed) as launched:
        for _ in range(2):
            launched.clear()
            model(x).square().mean().backward()
            # Backward, too: the first layer's input wants no gradient, and one layer has two sources.
            assert roundings(launched) == 2 * convs


def test_who_looks_on_sees_no_weight_that_nobody_fills(on_our_kernels, seed, monkeypatch):
    """The launch that rounds a kept weight is no operator, which a tracer would see."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model, x = FastUNet(1, 2, (8, 16)).eval(), torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        traced = make_fx(model)(x)
        assert not any("empty" in str(node.target) for node in traced.graph.nodes)
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_taken_from_a_rounded_weight_is_not_rounded_again(launchers, mode, make, monkeypatch):
    weight, low, skip = make("tf32", 16, 24, 3, 3), make("tf32", 1, 16, 2, 3), make("tf32", 1, 8, 4, 6)
    with mode():
        kept = kernels.tf32.marked_as_rounded(kernels.tf32.rounded_weight(weight, tf32=True))
        right = [launchers.upconcat_conv3x3_commuted_fwd(low, skip, w, None, **UPSAMPLED) for w in (weight, kept)]
        assert torch.equal(*right)
        monkeypatch.setattr(kernels.tf32, "launch", launching_but(kernels.tf32._round_kernel))
        assert torch.equal(launchers.upconcat_conv3x3_commuted_fwd(low, skip, kept, None, **UPSAMPLED), right[0])


def launching_but(forbidden):
    def launch(kernel, *arguments, **options):
        assert kernel is not forbidden
        plain_launch(kernel, *arguments, **options)

    return launch
