"""``fastunet.verify`` passes what is right, and catches and locates deliberate faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastunet
from fastunet import FastUNet, dispatch, ops, reference
from fastunet.reference import UNet

NETWORKS = [
    {},
    {"align_corners": False, "activation": "leaky_relu"},
    {"norm": "batch"},
    {"upsample": "transpose"},
    {"upsample": "bilinear_conv", "norm": "batch"},
    {"upsample": "nearest", "norm": "instance"},
]


def pair(**options) -> tuple[FastUNet, UNet]:
    """A model and a reference of the same weights, batch norm with statistics of its own."""
    model = FastUNet(2, 3, (4, 6, 8), **options)
    if options.get("norm") == "batch":
        with torch.no_grad():
            model(3 * torch.randn(2, 2, 16, 16) + 1)
    plain = UNet(2, 3, (4, 6, 8), **options)
    plain.load_state_dict(model.state_dict())
    return model.eval(), plain.eval()


@pytest.fixture
def x(seed: int) -> Tensor:
    return torch.randn(2, 2, 19, 22)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_the_model_as_it_is_passes(options, dtype, x):
    model, plain = pair(**options)
    report = fastunet.verify(model, plain, x, dtype=dtype)
    assert report.ok, str(report)
    assert str(report).endswith("\nparity")
    kinds = [c.kind for c in report.comparisons]
    assert kinds.count("gradient") == len(list(model.parameters())) + 1
    layers = 0 if options.get("norm") == "instance" else len(fastunet.explain(model, (2, 2, 19, 22)).rows)
    assert kinds.count("layer") == layers
    assert next(model.parameters()).dtype == torch.float32  # copies were cast


def test_a_report_is_json(x):
    report = fastunet.verify(*pair(), x)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is True
    assert data["comparisons"][0]["name"] == "downs.0.conv.net.0"
    assert data["comparisons"][0]["ratio"] == report.comparisons[0].ratio


def test_a_train_mode_network_is_compared_in_train_mode_and_left_as_it_was(x):
    model, plain = pair(norm="batch")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    report = fastunet.verify(model.train(), plain.train(), x, deterministic=False)
    assert report.ok, str(report)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_the_kernels_pass(x):
    model, plain = pair(norm="batch")
    with dispatch.forced("triton"):
        report = fastunet.verify(model, plain, x[..., :4, :6], dtype=torch.float16)
    assert report.ok, str(report)
    assert {c.implementation for c in report.comparisons if c.kind != "gradient"} == {"triton"}


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_the_kernels_pass_on_a_gpu(options, dtype, x):
    model, plain = pair(**options)
    report = fastunet.verify(model.cuda(), plain.cuda(), x.cuda(), dtype=dtype)
    assert report.ok, str(report)
    assert {"another stream", "another batch position"} <= {check.name for check in report.checks}


# --- mutants: (function of ops, its faulty double, first layer to break) ------------------------


def shifted_tap(x, weight, bias, slope):
    weight = weight.roll(1, 3) if weight.shape[-1] == 3 else weight
    return reference.conv2d_relu(x, weight, bias, slope)


def no_bias(x, weight, bias, slope):
    return reference.conv2d_relu(x, weight, None, slope)


def replicated_border(x, weight, bias, slope):
    pad = weight.shape[-1] // 2
    y = F.conv2d(F.pad(x, [pad] * 4, mode="replicate"), weight, bias)
    return reference.activate_(y, slope)


def activation_before_bias(x, weight, bias, slope):
    return reference.conv2d_relu(x, weight, None, slope) + bias[:, None, None]


def last_channel_skipped(x, weight, bias, slope):
    return reference.conv2d_relu(x[:, :-1], weight[:, :-1], bias, slope)


def half_precision_sum(x, weight, bias, slope):
    """Each tap's part is rounded to bfloat16 as it is added."""
    pad = weight.shape[-1] // 2
    total = torch.zeros(1, dtype=torch.bfloat16)
    for row in range(weight.shape[-1]):
        for column in range(weight.shape[-1]):
            one = torch.zeros_like(weight)
            one[..., row, column] = weight[..., row, column]
            total = (total + F.conv2d(x, one, None, padding=pad)).bfloat16()
    return reference.activate_(total.to(x.dtype) + bias[:, None, None], slope)


def seam(x, weight, bias, slope):
    y = reference.conv2d_relu(x, weight, bias, slope)
    if x.shape[3] > 16:
        y[..., 16] = reference.conv2d_relu(x[..., 16:], weight, bias, slope)[..., 0]  # as if nothing were left of it
    return y


# In bfloat16 a half-precision sum or other corners may hide among the roundings: float32 shows them.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "fault",
    [shifted_tap, no_bias, replicated_border, activation_before_bias, last_channel_skipped, half_precision_sum, seam],
)
def test_a_faulty_convolution_is_caught_in_the_first_layer(fault: Callable, dtype, x, monkeypatch):
    model, plain = pair()
    monkeypatch.setattr(ops, "reference", Faulty(reference, conv2d_relu=fault))
    report = fastunet.verify(model, plain, x, dtype=dtype, deterministic=False)
    assert not report.ok
    assert report.first_failure is not None
    assert report.first_failure.name == "downs.0.conv.net.0", str(report)
    assert f"first to break the rule: layer {report.first_failure.name}, on torch" in str(report)


def swapped_concat(x, skip, weight, bias, mode, align_corners, slope):
    y = reference.upsample_concat(x, skip, mode, align_corners)
    return reference.conv2d_relu(y.roll(skip.shape[1], 1), weight, bias, slope)


def other_corners(x, skip, weight, bias, mode, align_corners, slope):
    return reference.upsample_concat_conv2d_relu(x, skip, weight, bias, mode, not align_corners, slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("fault", [swapped_concat, other_corners])
def test_a_faulty_decoder_is_caught_where_it_begins(fault: Callable, dtype, x, monkeypatch):
    model, plain = pair()
    monkeypatch.setattr(ops, "reference", Faulty(reference, upsample_concat_conv2d_relu=fault))
    report = fastunet.verify(model, plain, x, dtype=dtype, deterministic=False)
    assert report.first_failure is not None and report.first_failure.name == "ups.0.conv.net.0", str(report)


def test_a_pool_off_by_one_is_caught_in_the_layer_that_reads_it(x, monkeypatch):
    model, plain = pair()
    pool = F.max_pool2d
    monkeypatch.setattr(ops, "F", Faulty(F, max_pool2d=lambda x, size: pool(x.roll(1, 3), size)))
    report = fastunet.verify(model, plain, x)
    assert report.first_failure is not None and report.first_failure.name == "downs.1.conv.net.0", str(report)


def test_a_stale_folded_norm_is_caught(x, monkeypatch):
    model, plain = pair(norm="batch")
    fold = fastunet.model._fold
    monkeypatch.setattr(
        fastunet.model,
        "_fold",
        lambda w, b, norm: fold(w, b, norm and FreshNorm(norm, running_var=norm.running_var * 2)),
    )
    report = fastunet.verify(model, plain, x)
    assert report.first_failure is not None and report.first_failure.name == "downs.0.conv.net.0", str(report)


def scaled(which: int, channels: int) -> Callable:
    """The backward of a convolution of so many input channels, one gradient of it a hundredth too large."""
    right = ops._convolution_backward

    def backward(grad, x, weight, *others):
        found = list(right(grad, x, weight, *others))
        if weight.shape[1] == channels:
            found[which] = found[which] * 1.01
        return tuple(found)

    return backward


def mask_forgotten(grad, y, slope):
    return grad


def mask_of_negative(grad, y, slope):
    return grad if slope == 1 else torch.where(y > 0, torch.zeros_like(grad), grad)


@pytest.mark.parametrize(
    "function, fault, first",
    [
        # The only convolution of 2 channels in is the first of all, that of 14 the first of the decoder.
        ("_convolution_backward", scaled(1, 2), "downs.0.conv.net.0.weight"),
        ("_convolution_backward", scaled(0, 2), "input"),
        ("_convolution_backward", scaled(1, 14), "ups.0.conv.net.0.weight"),
        ("_activation_backward", mask_forgotten, "ups.1.conv.net.2.bias"),
        ("_activation_backward", mask_of_negative, "ups.1.conv.net.2.bias"),
    ],
    ids=["first weight", "input", "decoder weight", "mask forgotten", "mask of the negative"],
)
def test_a_faulty_gradient_is_caught_where_it_is_found(function, fault, first, x, monkeypatch):
    model, plain = pair()
    monkeypatch.setattr(ops, function, fault)
    report = fastunet.verify(model, plain, x)
    assert not report.ok
    assert report.first_failure is not None
    assert (report.first_failure.kind, report.first_failure.name) == ("gradient", first), str(report)


def test_a_gradient_that_does_not_repeat_is_caught(x, monkeypatch):
    model, plain = pair()
    right, calls = ops._convolution_backward, []

    def backward(*args):
        calls.append(0)
        return tuple(None if g is None else g * (1 + 1e-6 * len(calls)) for g in right(*args))

    monkeypatch.setattr(ops, "_convolution_backward", backward)
    report = fastunet.verify(model, plain, x)
    assert "gradients, second run" in {check.name for check in report.checks if not check.ok}, str(report)


def test_a_missing_gradient_is_caught(x, monkeypatch):
    model, plain = pair()
    right = ops._convolution_backward
    monkeypatch.setattr(ops, "_convolution_backward", lambda *a: (right(*a)[0], None, None))
    report = fastunet.verify(model, plain, x, deterministic=False)
    assert report.first_failure is not None
    assert report.first_failure.name == "head.bias", str(report)
    assert report.first_failure.parity.reason == "the candidate has no gradient"
    # A reference that asks for none does not hide it.
    assert not fastunet.verify(model, plain.requires_grad_(False), x, deterministic=False).ok


class Otherwise(FastUNet):
    """Right as long as no gradient is wanted."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 1 if torch.is_grad_enabled() else y


def test_the_forward_pass_of_training_is_compared_too(x):
    model, plain = pair()
    model.__class__ = Otherwise
    report = fastunet.verify(model, plain, x)
    assert report.first_failure is not None and report.first_failure.name == "logits with gradients", str(report)


def test_weights_prepared_once_and_for_all_are_caught(x, monkeypatch):
    model, plain = pair(norm="batch")
    monkeypatch.setattr(fastunet.model._Prepared, "fresh", lambda *_: True)
    report = fastunet.verify(model, plain, x)
    assert [check.name for check in report.checks if not check.ok] == ["after weights changed in place"], str(report)


def test_a_model_with_stale_weights_is_caught_itself(x):
    model, plain = pair()
    with torch.no_grad():
        model(x)
    model.get_parameter("bottleneck.net.0.weight").data.mul_(2)  # which no version counts
    plain.load_state_dict(model.state_dict())
    report = fastunet.verify(model, plain, x)
    assert [check.name for check in report.checks if not check.ok] == ["the model itself, not a copy"], str(report)
    model.refresh()
    assert fastunet.verify(model, plain, x).ok


def test_a_model_that_overflows_does_not_hold(x):
    model, plain = pair()
    with torch.no_grad():
        for network in (model, plain):
            network.head.weight.mul_(1e6)
    report = fastunet.verify(model, plain, x, dtype=torch.float16, gradients=False)
    assert "finite output" in {check.name for check in report.checks if not check.ok}, str(report)
    with pytest.raises(ValueError, match=r"inputs: expected values within the range of torch.float16"):
        fastunet.verify(model, plain, x * 1e6, dtype=torch.float16)


def test_a_network_that_trains_behind_norms_that_do_not(x):
    model, plain = pair(norm="batch")
    for network in (model, plain):
        network.train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    report = fastunet.verify(model, plain, x)
    assert report.ok, str(report)


def test_frozen_parameters_have_no_gradient_to_compare(x):
    model, plain = pair(norm="batch")
    for network in (model, plain):
        network.downs.requires_grad_(False)
    report = fastunet.verify(model, plain, x)
    assert report.ok, str(report)
    names = {c.name for c in report.comparisons if c.kind == "gradient"}
    assert "bottleneck.net.0.weight" in names and not any(name.startswith("downs") for name in names)


@pytest.mark.parametrize(
    "name, forward",
    [
        ("second run", lambda y, calls: y + calls),
        ("every element written", lambda y, calls: torch.where(torch.rand(y.shape) < 0.1, torch.empty_like(y), y)),
    ],
)
def test_a_result_that_does_not_repeat_is_caught(name, forward, x):
    model, plain = pair()

    class Unsteady(FastUNet):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Unsteady.calls += 1
            return forward(super().forward(x), Unsteady.calls)

    model.__class__ = Unsteady
    report = fastunet.verify(model, plain, x)
    assert name in {check.name for check in report.checks if not check.ok}, str(report)


class Faulty:
    """A module's functions, some replaced, for one importer alone."""

    def __init__(self, module: Any, **faults: Callable) -> None:
        self.__dict__.update(vars(module) | faults)


class FreshNorm:
    """A batch norm's attributes, some replaced."""

    def __init__(self, norm: nn.BatchNorm2d, **others: Tensor) -> None:
        for name in ("weight", "bias", "running_mean", "running_var", "eps"):
            setattr(self, name, others.get(name, getattr(norm, name)))


# --- a reference of one's own, and refusals ----------------------------------------------------


class Own(nn.Module):
    """The same function under other parameter names."""

    def __init__(self, plain: UNet) -> None:
        super().__init__()
        self.network = plain

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def test_a_reference_with_its_own_names_is_compared_in_its_output(x):
    model, plain = pair()
    report = fastunet.verify(model, Own(plain), x)
    assert report.ok
    assert [(c.kind, c.name) for c in report.comparisons] == [
        ("output", "logits"),
        ("output", "logits with gradients"),
        ("gradient", "input"),
    ]


class Smooth(Own):
    """Shows no ReLU or max-pool, as a network compiled elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return self.network(x)


def test_a_reference_of_other_decisions_is_named(x):
    model, plain = pair()
    with pytest.raises(ValueError, match="gradients: cannot be compared, .* more ReLUs and max-pools in the model"):
        fastunet.verify(model, Smooth(plain), x)
    assert fastunet.verify(model, Smooth(plain), x, gradients=False).ok


def test_clear_errors(x):
    model, plain = pair()
    with pytest.raises(ValueError, match=r"inputs: expected finite values, found NaN or infinity"):
        fastunet.verify(model, plain, x / 0)
    with pytest.raises(ValueError, match=r"inputs: expected floating \(N, C, H, W\), got torch.float32 \(2, 19, 22\)"):
        fastunet.verify(model, plain, x[:, 0])
    with pytest.raises(ValueError, match=r"reference: expected 'downs.0.conv.net.0.weight' of shape"):
        fastunet.verify(model, UNet(2, 3, (5, 6, 8)), x)
    with pytest.raises(ValueError, match=r"reference: expected the model's parameters, lacks 'downs.1"):
        fastunet.verify(model, UNet(2, 3, (4, 8)), x)
    with pytest.raises(ValueError, match="outputs: expected one shape"):
        fastunet.verify(model, Own(UNet(2, 2, (4, 6, 8))), x)
    with torch.no_grad():
        plain.head.weight[1] += 1
    with pytest.raises(ValueError, match="reference: expected plain PyTorch, got a FastUNet"):
        fastunet.verify(model, model, x)
    with pytest.raises(ValueError, match=r"reference: expected the model's weights, 'head.weight' holds other values"):
        fastunet.verify(model, plain, x)
