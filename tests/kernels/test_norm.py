"""Batch norm of a training step and instance norm, activation and max-pool, and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastunet import kernels
from fastunet.kernels import tuning
from fastunet.kernels.norm import merged_statistics

from .conftest import check

pytestmark = pytest.mark.usefixtures("poisoned")

STAGES = 2  # statistics, whose errors a whole channel shares, and what is made of them
# (N, C, H, W): each for a reason.
SHAPES = [
    pytest.param((2, 3, 5, 7), id="odd-everything"),
    pytest.param((1, 70, 2, 3), id="two-channel-tiles"),
    pytest.param((3, 3, 18, 16), id="several-slabs"),  # of each image too
]


def statistics(x):
    """Fixed ones, the same in every dtype."""
    c = torch.arange(x.shape[1]) % 8
    return ((c - 4) / 8).to(x), ((c + 1) / 4).to(x)


def norm(x, weight, bias, slope, kind):
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if kind == "images":
        y = F.instance_norm(x, weight=weight, bias=bias, eps=1e-5)
    else:
        fixed = statistics(x) if kind == "fixed" else (None, None)
        y = F.batch_norm(x, *fixed, weight, bias, kind != "fixed", 0.0, 1e-5)
    return F.leaky_relu(y, slope)


def forward(x, weight, bias, slope, kind, pool):
    fixed = statistics(x) if kind == "fixed" else None
    return kernels.norm_fwd(x, weight, bias, fixed, eps=1e-5, slope=slope, pool=pool, per_image=kind == "images")


@pytest.mark.parametrize(
    "slope, kind", [(0.0, "batch"), (0.1, "batch"), (1.0, "batch"), (0.1, "images"), (0.0, "fixed")], ids=str
)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape, slope, kind, precision, make):
    x, weight, bias = make(precision, *shape), make(precision, shape[1]), make(precision, shape[1])
    y, pooled, mean, rstd, variance = forward(x, weight, bias, slope, kind, True)
    check(precision, y, norm, x, weight, bias, slope, kind, stages=STAGES)
    assert pooled is not None and torch.equal(pooled, F.max_pool2d(y, 2))
    exact, axes = x.double(), (2, 3) if kind == "images" else (0, 2, 3)
    expected = exact.mean(axes), exact.var(axes), exact.var(axes, unbiased=False)
    if kind == "fixed":
        expected = *(t.double() for t in statistics(x)), statistics(x)[1].double()
    torch.testing.assert_close(mean.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), expected[1], rtol=2e-6, atol=0)
    torch.testing.assert_close(rstd.double() ** -2, expected[2] + 1e-5, rtol=2e-6, atol=0)
    alone = forward(x, weight, bias, slope, kind, False)
    assert alone[1] is None and torch.equal(alone[0], y)


def test_an_image_is_normed_alike_in_every_batch(make, monkeypatch):
    monkeypatch.setattr(tuning, "REDUCTION_PROGRAMS", 8)  # so few that three images would share them
    x = make("fp16", 3, 5, 40, 41)
    together, alone = (
        kernels.norm_fwd(images, None, None, eps=1e-5, slope=1.0, pool=False, per_image=True)[0]
        for images in (x, x[1:2])
    )
    assert torch.equal(together[1:2], alone)


def test_statistics_far_from_zero(make):
    """A mean of 1,000 deviations: of sums of squares in float32 the variance would be 10% off."""
    x = make("ieee", 2, 5, 30, 31) * 0.1 + 100
    _, _, mean, _, variance = kernels.norm_fwd(x, None, None, eps=1e-5, slope=1.0, pool=False, per_image=False)
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=2e-7, atol=0)
    torch.testing.assert_close(variance.double(), exact.var((0, 2, 3)), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "slope, pool, kind",
    [
        (0.0, True, "batch"),
        (0.0, False, "batch"),
        (0.1, True, "batch"),
        (1.0, False, "batch"),
        (1.0, True, "batch"),
        (0.0, True, "images"),
        (1.0, False, "images"),
        (0.1, True, "fixed"),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape, slope, pool, kind, precision, make):
    n, c, h, w = shape
    x, grad, weight = make(precision, *shape), make(precision, *shape), make(precision, c)
    bias, grad_pooled = make(precision, c), make(precision, n, c, h // 2, w // 2) if pool else None
    y, _, mean, rstd, _ = forward(x, weight, bias, slope, kind, False)
    sides, places = y > 0, F.max_pool2d(y, 2, return_indices=True)[1]

    def g(grad, grad_pooled):
        """Behind the norm, with the sides and places of the kernel's own y."""
        if pool:
            scattered = torch.zeros_like(grad).flatten(2)
            scattered.scatter_(2, places.to(grad.device).flatten(2), grad_pooled.flatten(2))
            grad = grad + scattered.view_as(grad)
        return torch.where(sides.to(grad.device), grad, grad * slope)

    def truth(which):
        def gradient(x, weight, bias, grad, grad_pooled=None):
            leaves: list[Any] = [t.clone().requires_grad_() for t in (x, weight, bias)]
            return torch.autograd.grad(norm(*leaves, slope=1.0, kind=kind), leaves[which], g(grad, grad_pooled))[0]

        return gradient

    def launch():
        return kernels.norm_bwd(grad, grad_pooled, x, y, weight, mean, rstd, slope=slope, fixed=kind == "fixed")

    found = launch()
    inputs = x, weight, bias, grad, grad_pooled
    # What a norm subtracts cancels: a gradient's errors are as large as its terms.
    terms: Any = {"stages": STAGES, "summed": lambda x, weight, bias, grad, grad_pooled: g(grad, grad_pooled)}
    check(precision, found[0], truth(0), *inputs, stages=STAGES)
    for got, which in ((found[1][1], 1), (found[1][0], 2)):
        as_map = lambda *a, which=which: truth(which)(*a)[None, :, None, None]
        check(precision, got.to(x.dtype)[None, :, None, None], as_map, *inputs, **terms)
    assert all(torch.equal(a, b) for a, b in zip(found, launch(), strict=True))


def test_any_strides_and_no_parameters(make):
    x, grad = (make("fp16", 2, 6, 5, 8).transpose(1, 2) for _ in range(2))
    options: Any = {"eps": 1e-3, "pool": False, "per_image": False}
    y, _, mean, rstd, _ = kernels.norm_fwd(x, None, None, slope=0.0, **options)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, None, None, True, 0.0, 1e-3).relu(), rtol=2e-3, atol=2e-3)
    wide = make("fp16", 5, 2)  # a column of it, and one value for all
    strided = kernels.norm_fwd(x, wide[:, 0], wide[:1, 1].expand(5), slope=1.0, **options)[0]
    expected = F.batch_norm(x, None, None, wide[:, 0].contiguous(), wide[0, 1].repeat(5), True, 0.0, 1e-3)
    torch.testing.assert_close(strided, expected, rtol=5e-3, atol=5e-3, check_stride=False)
    leaf = x.double().requires_grad_()
    exact = F.batch_norm(leaf, None, None, None, None, True, 0.0, 1e-3)
    (want,) = torch.autograd.grad(exact, leaf, torch.where(y > 0, grad.double(), 0.0))
    got, _ = kernels.norm_bwd(grad, None, x, y, None, mean, rstd, slope=0.0)
    torch.testing.assert_close(got.double(), want, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "image"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_nan_and_inf_spoil_their_channel_alone(value, per_image, make):
    x = make("ieee", 2, 3, 4, 5)
    x[1, 1, 2, 3] = value
    y, pooled, mean, _, _ = kernels.norm_fwd(x, None, None, eps=1e-5, slope=0.0, pool=True, per_image=per_image)
    expected = (F.instance_norm(x) if per_image else F.batch_norm(x, None, None, None, None, True)).relu()
    assert pooled is not None and torch.equal(pooled.isnan(), F.max_pool2d(expected, 2).isnan())
    assert torch.equal(y.isnan(), expected.isnan())
    spoilt = torch.tensor([[False] * 3, [False, True, False]] if per_image else [False, True, False])
    assert torch.equal(~mean.isfinite().cpu(), spoilt)


@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "image"])
def test_an_empty_batch(per_image, make):
    x = make("fp16", 0, 3, 4, 4)
    y, pooled, mean, rstd, _ = kernels.norm_fwd(x, None, None, eps=1e-5, slope=0.0, pool=True, per_image=per_image)
    assert y.shape == x.shape and pooled is not None and pooled.shape == (0, 3, 2, 2) and mean.isnan().all()
    grad_x, sums = kernels.norm_bwd(x, None, x, y, None, mean, rstd, slope=0.0)
    assert grad_x.shape == x.shape and sums.shape == (2, 3) and not sums.any()


@pytest.mark.parametrize("slabs", [1, 63, 600, 1300], ids=lambda slabs: f"{slabs}-slabs")
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "image"])
def test_slabs_of_tiles_are_merged(slabs, per_image, seed, device):
    """Many of them in steps; of unequal counts, none of them among these, and far from 0."""
    groups, c, sizes = 3 if per_image else 1, 5, torch.randint(0, 5, (slabs,))
    sizes[0] = 2
    pixels = [torch.randn(n, groups, c, dtype=torch.float64) * 2 + 500 for n in sizes.tolist()]
    partial = torch.zeros(slabs, 3, groups, c, dtype=torch.float64)
    for slab, x in enumerate(pixels):
        partial[slab, 0] = len(x)
        if len(x):
            partial[slab, 1], partial[slab, 2] = x.mean(0), (x - x.mean(0)).square().sum(0)
    found = merged_statistics(partial.float().to(device), 1e-5, per_image)
    whole = torch.cat(pixels)
    biased, mean = torch.var_mean(whole, 0, correction=0)
    expected = mean, torch.rsqrt(biased + 1e-5), biased * len(whole) / (len(whole) - 1)
    for mine, exact in zip(found, expected, strict=True):
        exact = exact if per_image else exact[0]
        torch.testing.assert_close(mine.double().cpu(), exact, rtol=1e-4, atol=0)
