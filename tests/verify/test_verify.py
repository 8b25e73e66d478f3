"""``fastunet.verify`` passes what is right."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

import fastunet
from fastunet import dispatch
from fastunet.reference import UNet

from .networks import NETWORKS, pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_the_model_as_it_is_passes(options, dtype, x):
    model, plain = pair(**options)
    report = fastunet.verify(model, plain, x, dtype=dtype)
    assert report.ok, str(report)
    assert str(report).endswith("\nparity")
    kinds = [c.kind for c in report.comparisons]
    assert kinds.count("gradient") == len(list(model.parameters())) + 1
    operators = len(fastunet.explain(model, (2, 2, 19, 22)).rows)
    assert kinds.count("layer") == (0 if options.get("norm") == "instance" else operators + model.config.depth)
    assert next(model.parameters()).dtype == torch.float32  # copies were cast


def test_results_are_told_as_they_are_found(x):
    found = []
    report = fastunet.verify(*pair(), x, on_result=found.append)
    assert len(found) == len(report.comparisons) + len(report.checks)
    assert set(map(id, found)) == set(map(id, (*report.comparisons, *report.checks)))


def test_a_reference_in_the_working_dtype_is_of_the_same_weights(x):
    model, plain = pair()
    assert fastunet.verify(model, plain.half(), x, dtype=torch.float16).ok
    with pytest.raises(ValueError, match="holds other values"):
        fastunet.verify(model, plain, x, dtype=torch.float32)


def test_a_report_is_json(x):
    report = fastunet.verify(*pair(), x)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is True
    assert data["comparisons"][0]["name"] == "downs.0.conv.net.0"
    assert data["comparisons"][0]["ratio"] == vars(report.comparisons[0].ratio)


def test_a_train_mode_network_is_compared_in_train_mode_and_left_as_it_was(x):
    model, plain = pair(norm="batch")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    report = fastunet.verify(model.train(), plain.train(), x, deterministic=False)
    assert report.ok, str(report)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_the_kernels_pass(x, device):
    model, plain = (network.to(device) for network in pair(norm="batch"))
    with dispatch.forced("triton"):
        report = fastunet.verify(model, plain, x[..., :4, :6].to(device), dtype=torch.float16)
    assert report.ok, str(report)
    assert {c.implementation for c in report.comparisons} == {"triton"}
    assert all(c.alone is not None and c.alone.parity.ok for c in report.comparisons if c.kind == "layer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_upsampling_behind_the_products_passes(dtype, x, device):
    model, plain = (network.to(device) for network in pair())
    with dispatch.forced("commuted"):
        options = {"dtype": dtype, "deterministic": False, "gradients": False}
        report = fastunet.verify(model, plain, x[..., :5, :7].to(device), **options)
    assert report.ok, str(report)
    served = {c.name for c in report.comparisons if c.implementation == "commuted"}
    assert served == {f"ups.{level}.conv.net.0" for level in range(len(model.ups))}


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_the_kernels_pass_on_a_gpu(options, dtype, x):
    model, plain = pair(**options)
    report = fastunet.verify(model.cuda(), plain.cuda(), x.cuda(), dtype=dtype)
    assert report.ok, str(report)
    assert {"another stream", "another batch position"} <= {check.name for check in report.checks}


@pytest.mark.parametrize("frozen", [slice(1), slice(1, None)], ids=["first", "others"])
def test_the_kernels_with_some_norms_frozen(frozen, x, device):
    """What is folded and pooled in one operator differs from level to level."""
    model, plain = (network.to(device).train() for network in pair(norm="batch"))
    for network in (model, plain):
        for down in list(network.downs)[frozen]:  # pyright: ignore[reportArgumentType]
            down.eval()
    with dispatch.forced("triton"):
        # float16: in float32 torch's own batch norm of a CPU loses more in channels_last than the rule allows.
        options = {"dtype": torch.float16, "deterministic": False, "gradients": False}
        # Of a smaller image the bottleneck has 8 pixels, whose variance may be so small that it blows up roundings.
        report = fastunet.verify(model, plain, x[..., :16, :18].to(device), **options)
    assert report.ok, str(report)


def test_a_network_that_trains_behind_norms_that_do_not(x):
    model, plain = pair(norm="batch")
    for network in (model, plain):
        network.train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    report = fastunet.verify(model, plain, x)
    assert report.ok, str(report)


def test_gradients_say_which_step_gave_them(x, device):
    model, plain = (network.to(device) for network in pair(padding="valid", match="center_crop"))
    x = torch.randn(1, x.shape[1], 44, 44, device=device)
    with dispatch.forced("triton"), dispatch.forced("torch", "wgrad"):
        report = fastunet.verify(model, plain, x, deterministic=False)
    assert report.ok, str(report)
    ran_on = {c.name: c.implementation for c in report.comparisons if c.kind == "gradient"}
    assert ran_on["head.weight"] == ran_on["bottleneck.net.0.weight"] == "torch"
    assert ran_on["input"] == ran_on["bottleneck.net.0.bias"] == "triton"


class Scaled(fastunet.FastUNet):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.scale = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]).view(3, 1, 1))

    def forward(self, x):
        return super().forward(x) * self.scale


class ScaledReference(UNet):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.scale = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, x):
        return super().forward(x) * self.scale


def test_parameters_of_no_layer_have_gradients_too(x):
    """Of a parametrized convolution, and a subclass's own."""
    model, plain = (network(2, 3, (4, 6)) for network in (Scaled, ScaledReference))
    for network in (model, plain):
        weight_norm(network.head)
        register_parametrization(network.bottleneck.net[0], "bias", nn.Softplus())
        weight_norm(network.bottleneck.net[2]).requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    report = fastunet.verify(model, plain, x, deterministic=False)
    assert report.ok, str(report)
    names = {c.name for c in report.comparisons if c.kind == "gradient"}
    assert {
        "scale",
        "head.parametrizations.weight.original0",
        "bottleneck.net.0.parametrizations.bias.original",
    } <= names


def test_a_dtype_of_no_kernel_is_refused(x):
    with pytest.raises(ValueError, match="dtype: expected float16, .* got float64"):
        fastunet.verify(*pair(), x, dtype=torch.float64)


def test_frozen_parameters_have_no_gradient_to_compare(x):
    model, plain = pair(norm="batch")
    for network in (model, plain):
        network.downs.requires_grad_(False)
    report = fastunet.verify(model, plain, x)
    assert report.ok, str(report)
    names = {c.name for c in report.comparisons if c.kind == "gradient"}
    assert "bottleneck.net.0.weight" in names and not any(name.startswith("downs") for name in names)
