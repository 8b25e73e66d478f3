"""Convolutions that give a norm's statistics: the operators, and networks whose norms take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastunet
from fastunet import dispatch, ops, reference
from fastunet.parity import compare

from ..verify.networks import pair
from .cases import Names

EPS = 1e-3


@pytest.fixture
def come_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper GPU, where a kernel gives them; here the kernels, or PyTorch, take them afterwards."""
    monkeypatch.setattr(ops, "_come_free", lambda *_, **options: True)


def of_two_sources(x, skip, weight, bias, **options):
    return ops.upsample_concat_conv2d_moments(x, skip, weight, bias, **options)


CASES = {
    "conv": (ops.conv2d_moments, lambda x, w, b: F.conv2d(x, w, b, padding=1), [(2, 3, 5, 6), (4, 3, 3, 3), (4,)]),
    "two sources": (
        of_two_sources,
        lambda x, s, w, b: reference.upsample_concat_conv2d_relu(x, s, w, b, "bilinear", True, 1.0),
        [(2, 3, 2, 3), (2, 2, 5, 6), (4, 5, 3, 3), (4,)],
    ),
}


@pytest.mark.usefixtures("come_free")
@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "image"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_map_and_its_statistics(case, per_image, implementation, seed, device):
    op, plain, shapes = case
    inputs = [torch.randn(shape, device=device) for shape in shapes]
    with dispatch.forced(implementation):
        y, taken = op(*inputs, eps=EPS, per_image=per_image)
    truth = plain(*(t.double().cpu() for t in inputs))
    parity = compare(y, plain(*inputs), truth, tf32=y.is_cuda)
    assert parity.ok, str(parity)
    axes = (2, 3) if per_image else (0, 2, 3)
    biased, mean = torch.var_mean(y.double().cpu(), axes, correction=0)
    expected = mean, torch.rsqrt(biased + EPS), torch.var(y.double().cpu(), axes)
    for found, exact in zip(taken, expected, strict=True):
        torch.testing.assert_close(found.double().cpu(), exact, rtol=1e-5, atol=1e-5)
        assert not found.requires_grad


@pytest.mark.usefixtures("come_free")
@pytest.mark.parametrize(
    "implementation, norms",
    [("torch", ["batch"]), ("torch", ["instance"]), ("triton", ["batch", "instance"])],  # of the last either, by seed
    ids=["torch-batch", "torch-instance", "triton"],
)
def test_a_network_trains_by_them(norms, implementation, seed, device):
    """Layers, output and gradients by the rule, running statistics too; and the norms take no others."""
    norm = norms[seed % len(norms)]
    model, plain = (network.to(device).train() for network in pair(norm=norm))
    x = torch.randn(2, 2, 8, 8, device=device)
    with dispatch.forced(implementation):
        report = fastunet.verify(model, plain, x, deterministic=False)
        assert report.ok, str(report)
        with Names() as names:
            model(x).sum().backward()
    plain(x).sum().backward()
    assert {"fastunet::conv2d_moments", "fastunet::upsample_concat_conv2d_moments"} <= names.seen
    for (name, mine), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.usefixtures("come_free")
def test_a_norm_takes_what_it_is_given(seed, device):
    """And does not look for itself: of other statistics the result is another."""
    x, options = torch.randn(2, 3, 4, 4, device=device), dict[str, Any](eps=EPS, relu=False)
    with dispatch.forced("triton"):
        taken = torch.zeros(3, device=device), torch.full((3,), 2.0, device=device), torch.ones(3, device=device)
        y, _, mean, variance = ops.batch_norm_relu(x, taken=taken, **options)
        assert torch.equal(y, 2 * x) and mean is taken[0] and variance is taken[2]
        of_images: Any = tuple(t.expand(2, 3) for t in taken)
        assert torch.equal(ops.instance_norm_relu(x, taken=of_images, **options)[0], 2 * x)


def test_where_they_do_not_come_free_there_are_none(seed):
    x, w = torch.randn(1, 3, 5, 6), torch.randn(4, 3, 3, 3)
    y, taken = ops.conv2d_moments(x, w, eps=EPS, per_image=False)
    assert taken is None and torch.equal(y, ops.conv2d_relu(x, w, relu=False))
    skip, wide = torch.randn(1, 2, 10, 12), torch.randn(4, 5, 3, 3)
    y, taken = ops.upsample_concat_conv2d_moments(x, skip, wide, eps=EPS, per_image=True)
    assert taken is None and torch.equal(y, ops.upsample_concat_conv2d_relu(x, skip, wide, relu=False))


def test_bad_statistics_are_named():
    x, three = torch.zeros(2, 3, 4, 4), (torch.zeros(3), torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"taken: expected three tensors \(2, 3\), torch.float32 on cpu, got \["):
        ops.instance_norm_relu(x, taken=three)
    others: list[Any] = [three[:2], (three[0], None, three[2]), (three[0].double(), *three[1:])]
    for taken in others:
        with pytest.raises(ValueError, match=r"taken: expected three tensors \(3,\), torch.float32 on cpu, got \["):
            ops.batch_norm_relu(x, taken=taken)
    running: Any = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    with pytest.raises(ValueError, match="taken: expected None beside running_mean and running_var, got both"):
        ops.batch_norm_relu(x, taken=three, **running)
