"""The gradient kernels against torch's own gradients of the reference, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastunet import kernels, reference

from .conftest import PRECISIONS, check, far_apart
from .test_conv import STRIDES

pytestmark = pytest.mark.usefixtures("poisoned")


def gradient(function: Callable[..., Tensor], wanted: int) -> Callable[..., Tensor]:
    """(grad, *inputs) -> gradient of one of them through ``function``, channels_last."""

    def call(grad: Tensor, *inputs: Any) -> Tensor:
        leaves = [t.detach().requires_grad_(i == wanted) if isinstance(t, Tensor) else t for i, t in enumerate(inputs)]
        return torch.autograd.grad(function(*leaves), leaves[wanted], grad)[0]

    return call


def repeated(launch: Callable[[], Tensor]) -> Tensor:
    """The result, which must be the same to the bit twice."""
    first = launch()
    assert torch.equal(first.nan_to_num(1e9), launch().nan_to_num(1e9))
    return first


def wgrad(g: Tensor, sources: list[Tensor], ksize: int, *, tf32: bool = True) -> Tensor:
    return kernels.conv_wgrad(g, sources, ksize, bias=False, tf32=tf32)[0]


# (N, C, H, W, O): each for a reason.
SHAPES = [
    pytest.param((1, 1, 5, 7, 3), id="one-channel"),
    pytest.param((2, 3, 6, 9, 17), id="rgb"),
    pytest.param((1, 4, 6, 5, 18), id="all-taps-of-four-channels"),
    pytest.param((2, 5, 9, 6, 17), id="odd-everything"),
    pytest.param((1, 17, 3, 18, 33), id="channels-not-of-16-bytes"),
    pytest.param((3, 130, 4, 4, 129), id="two-channel-tiles-several-images-a-step"),
]
# Of plain multiply-adds, whose tiles are smaller and many.
SMALLER: dict[tuple[str, Any], Any] = {("ieee", (3, 130, 4, 4, 129)): (3, 34, 4, 4, 33)}


@pytest.mark.parametrize("shape", SHAPES)
def test_dgrad_and_wgrad(shape, precision, make):
    n, c, h, w, o = SMALLER.get((precision, shape), shape)
    x, weight, g = make(precision, n, c, h, w), make(precision, o, c, 3, 3, fan_in=9 * o), make(precision, n, o, h, w)
    conv, tf32 = (lambda x, weight: F.conv2d(x, weight, padding=1)), precision == "tf32"
    check(precision, repeated(lambda: kernels.conv_dgrad(g, weight, tf32=tf32)), gradient(conv, 0), g, x, weight)
    check(precision, repeated(lambda: wgrad(g, [x], 3, tf32=tf32)), gradient(conv, 1), g, x, weight)


def test_more_slabs_than_one(precision, make):
    """40 x 40 pixels are several steps, so several slabs, in every dtype."""
    x, g = make(precision, 1, 3, 40, 40), make(precision, 1, 5, 40, 40)
    weight = make(precision, 5, 3, 3, 3)
    got = repeated(lambda: wgrad(g, [x], 3, tf32=precision == "tf32"))
    check(precision, got, gradient(lambda x, weight: F.conv2d(x, weight, padding=1), 1), g, x, weight)


@pytest.mark.parametrize("o", [1, 2, 21], ids=lambda o: f"{o}-classes")
def test_head(o, make):
    x, weight, g = make("bf16", 2, 20, 5, 7), make("bf16", o, 20, 1, 1, fan_in=o), make("bf16", 2, o, 5, 7)
    check("bf16", kernels.conv_dgrad(g, weight), gradient(F.conv2d, 0), g, x, weight)
    check("bf16", wgrad(g, [x], 1), gradient(F.conv2d, 1), g, x, weight)


def activated(x, slope):
    return reference.activate_(x.clone(), slope)


@pytest.mark.parametrize("slope, pool", [(0.0, False), (0.1, False), (0.0, True), (0.1, True), (1.0, True)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (1, 70, 2, 3), (3, 1, 9, 4)], ids=str)
def test_activation_pool_and_bias(shape, pool, slope, precision, make):
    n, o, h, w = shape
    x, grad = make(precision, *shape), make(precision, *shape)
    grad_pooled = make(precision, n, o, h // 2, w // 2) if pool else None
    y = activated(x, slope).contiguous(memory_format=torch.channels_last)

    def truth(x, grad, grad_pooled):
        # The sides and places of the working dtype's y; nothing of ours is computed with.
        leaf = x.clone().requires_grad_()
        result = activated(leaf, slope)
        found = torch.autograd.grad(result, leaf, grad, retain_graph=True)[0]
        if pool:
            found = found + torch.autograd.grad(F.max_pool2d(result, 2), leaf, grad_pooled)[0]
        return found

    g, bias = kernels.activation_bwd(grad, grad_pooled, y, slope=slope, bias=True)
    assert bias is not None
    check(precision, g.contiguous(memory_format=torch.channels_last), truth, x, grad, grad_pooled)
    check(
        precision,
        bias[None, :, None, None],
        lambda *a: truth(*a).sum((0, 2, 3))[None, :, None, None],
        x,
        grad,
        grad_pooled,
        summed=truth,
    )
    again = kernels.activation_bwd(grad, grad_pooled, y, slope=slope, bias=True)
    assert torch.equal(g, again[0]) and torch.equal(bias, again[1])  # pyright: ignore[reportArgumentType]
    assert kernels.activation_bwd(grad, grad_pooled, y, slope=slope, bias=False)[1] is None


@pytest.mark.parametrize("value", [0.0, torch.inf, -torch.inf, torch.nan], ids=["ties", "inf", "minus-inf", "nan"])
def test_the_maximum_is_where_torch_finds_it(value, seed, device):
    """Few distinct numbers, so that most cells have ties, and the special ones anywhere in a cell."""
    y = torch.randint(-1, 2, (3, 5, 8, 10), device=device).float()
    y[torch.rand_like(y) < 0.4] = value
    y = y.contiguous(memory_format=torch.channels_last)
    grad, grad_pooled = torch.randn_like(y), torch.randn(3, 5, 4, 5, device=device)
    leaf = y.clone().requires_grad_()
    pooled = torch.autograd.grad(F.max_pool2d(leaf, 2), leaf, grad_pooled)[0]
    for slope in (0.0, 0.2, 1.0):
        g, _ = kernels.activation_bwd(grad, grad_pooled, y, slope=slope, bias=False)
        want = grad + pooled
        if slope == 0:
            want = torch.ops.aten.threshold_backward(want, y, 0)
        elif slope != 1:
            want = torch.ops.aten.leaky_relu_backward(want, y, slope, True)
        torch.testing.assert_close(g, want, rtol=1e-6, atol=1e-6)


def test_a_dead_relu_stops_nan(seed, device):
    y = torch.randn(1, 4, 4, 6, device=device).relu().contiguous(memory_format=torch.channels_last)
    grad = torch.where(y > 0, 1.0, torch.nan)
    g, bias = kernels.activation_bwd(grad, None, y, slope=0.0, bias=True)
    assert torch.equal(g, (y > 0).float())
    assert torch.equal(bias, (y > 0).float().sum((0, 2, 3)))  # pyright: ignore[reportArgumentType]


MODES = [("nearest", False), ("bilinear", False), ("bilinear", True)]
# (N, C, h, w), (H, W): each for a reason.
MAPS = [
    pytest.param((2, 3, 4, 5), (8, 10), id="exact-double"),
    pytest.param((1, 17, 3, 4), (7, 9), id="padded"),
    pytest.param((1, 1, 1, 1), (2, 2), id="one-pixel"),
    pytest.param((1, 2, 4, 4), (6, 7), id="cropped"),
    pytest.param((1, 72, 1, 5), (3, 10), id="more-channels-than-a-block"),
]


def upsampled(x, height, width, mode, align_corners):
    return reference.pad_to(reference.upsample(x, mode, align_corners), height, width)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape, size", MAPS)
def test_upsample(shape, size, mode, precision, make):
    x, grad = make(precision, *shape), make(precision, *shape[:2], *size)
    options: Any = dict(zip(("mode", "align_corners"), mode, strict=True))
    got = repeated(lambda: kernels.upsample_bwd(grad, *shape[2:], **options))
    check(precision, got, gradient(upsampled, 0), grad, x, *size, *mode)
    check(precision, kernels.upsample_fwd(x, *size, **options), upsampled, x, *size, *mode)


@pytest.mark.parametrize(
    "sizes", [((6, 8), (7, 9)), ((6, 6), (5, 6)), ((4, 4), (4, 4))], ids=["padded", "cropped", "alike"]
)
@pytest.mark.parametrize("channels", [(3, 5), (18, 2)], ids=str)
def test_wgrad_of_two_sources(channels, sizes, precision, make):
    check_two_sources((*channels, 6), sizes, precision, make)


# By themselves they would take other pixels a step; all taps of four channels are more columns than a tile.
@pytest.mark.parametrize("channels", [(64, 32, 32), (3, 72, 16), (4, 4, 6)], ids=str)
def test_wgrad_of_sources_whose_tiles_differ(channels, precision, make):
    check_two_sources(channels, ((5, 9), (5, 9)), precision, make)


def check_two_sources(channels, sizes, precision, make):
    (c1, c2, o), (small, size) = channels, sizes
    x, skip, g = make(precision, 1, c1, *small), make(precision, 1, c2, *size), make(precision, 1, o, *size)
    weight = make(precision, o, c1 + c2, 3, 3)

    def conv(x, skip, weight):
        return F.conv2d(reference.upsample_concat(x, skip, "none", False), weight, padding=1)

    got = repeated(lambda: wgrad(g, [x, skip], 3, tf32=precision == "tf32"))
    check(precision, got, gradient(conv, 2), g, x, skip, weight)


@pytest.mark.parametrize("shape", [(2, 5, 3, 7, 4), (1, 64, 5, 8, 64), (1, 17, 4, 4, 3)], ids=["small", "tma", "odd"])
def test_conv_transpose(shape, precision, make):
    n, c, h, w, o = shape
    x, weight = make(precision, n, c, h, w), make(precision, c, o, 2, 2, fan_in=4 * o)
    g, tf32 = make(precision, n, o, 2 * h, 2 * w), precision == "tf32"
    conv = lambda x, weight: F.conv_transpose2d(x, weight, stride=2)
    got = repeated(lambda: kernels.conv_transpose_dgrad(g, weight, tf32=tf32))
    check(precision, got, gradient(conv, 0), g, x, weight)
    got = repeated(lambda: kernels.conv_transpose_wgrad(g, x, bias=False, tf32=tf32)[0])
    check(precision, got, gradient(conv, 1), g, x, weight)


def check_bias(precision: str, launch: Callable[[bool], tuple[Tensor, Tensor | None]], g: Tensor) -> None:
    """The bias of a launch is the sum of g over its pixels, twice the same; the weight is as without it."""
    weight, bias = launch(True)
    assert bias is not None and bias.dtype == g.dtype
    sums = lambda g: g.sum((0, 2, 3))[None, :, None, None]
    check(precision, bias[None, :, None, None], sums, g, summed=lambda g: g)
    again, alone = launch(True)[1], launch(False)
    assert torch.equal(bias, again) and torch.equal(weight, alone[0]) and alone[1] is None  # pyright: ignore


@pytest.mark.parametrize(
    "shape, channels, ksize",
    [
        pytest.param((2, 5, 5, 7), [3], 3, id="all-taps"),
        pytest.param((1, 2, 10, 14), [20], 1, id="head-of-several-slabs"),
        pytest.param((2, 130, 4, 6), [17], 3, id="two-blocks"),
        pytest.param((1, 6, 7, 9), [40, 3], 3, id="two-sources"),
        pytest.param((1, 6, 7, 9), [3, 40], 3, id="two-sources-all-taps-first"),
    ],
)
def test_bias_behind_no_activation(shape, channels, ksize, precision, make):
    g, sources = make(precision, *shape), [make(precision, shape[0], c, *shape[2:]) for c in channels]
    tf32 = precision == "tf32"
    check_bias(precision, lambda bias: kernels.conv_wgrad(g, sources, ksize, bias=bias, tf32=tf32), g)


@pytest.mark.parametrize("n, c, h, w, o", [(2, 5, 3, 7, 4), (1, 3, 9, 11, 1), (1, 70, 4, 4, 40)], ids=str)
def test_bias_of_a_transposed_convolution(n, c, h, w, o, precision, make):
    g, x, tf32 = make(precision, n, o, 2 * h, 2 * w), make(precision, n, c, h, w), precision == "tf32"
    check_bias(precision, lambda bias: kernels.conv_transpose_wgrad(g, x, bias=bias, tf32=tf32), g)


@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("c", [3, 16], ids=["image", "map"])
def test_any_strides(layout, c, make):
    change = STRIDES[layout]
    x, g, pooled = (
        change(make("fp16", 2, c, 4, 6)),
        change(make("fp16", 2, 16, 4, 6)),
        change(make("fp16", 2, 16, 2, 3)),
    )
    weight, conv = make("fp16", 16, c, 3, 3, fan_in=144), lambda x, weight: F.conv2d(x, weight, padding=1)
    check("fp16", kernels.conv_dgrad(g, weight), gradient(conv, 0), g, x, weight)
    check("fp16", wgrad(g, [x], 3), gradient(conv, 1), g, x, weight)
    check("fp16", kernels.upsample_bwd(g, 2, 3, mode="bilinear", align_corners=True),
          gradient(upsampled, 0), g, x[:, :1].expand(-1, 16, -1, -1)[:, :, :2, :3], 4, 6, "bilinear", True)  # fmt: skip
    y = make("fp16", 2, 16, 4, 6)
    got, _ = kernels.activation_bwd(g, pooled, change(y), slope=0.1, bias=True)
    want, _ = kernels.activation_bwd(g.contiguous(), pooled.contiguous(), change(y).contiguous(), slope=0.1, bias=True)
    assert torch.equal(got, want)


def test_empty_batch(make):
    x, g, weight = make("fp16", 0, 8, 4, 6), make("fp16", 0, 5, 4, 6), make("fp16", 5, 8, 3, 3)
    assert kernels.conv_dgrad(g, weight).shape == x.shape
    assert torch.equal(wgrad(g, [x], 3), torch.zeros_like(weight))
    got, bias = kernels.activation_bwd(g, make("fp16", 0, 5, 2, 3), g, slope=0.0, bias=True)
    assert got.shape == g.shape and torch.equal(bias, g.new_zeros(5))  # pyright: ignore[reportArgumentType]
    assert kernels.upsample_bwd(g, 2, 3, mode="nearest", align_corners=False).shape == (0, 5, 2, 3)
    assert kernels.conv_transpose_dgrad(g, make("fp16", 3, 5, 2, 2)).shape == (0, 3, 2, 3)
    transposed = kernels.conv_transpose_wgrad(g, make("fp16", 0, 3, 2, 3), bias=True)
    for (got, bias), shape in ((kernels.conv_wgrad(g, [x], 3, bias=True), (5, 8, 3, 3)), (transposed, (3, 5, 2, 2))):
        assert torch.equal(got, g.new_zeros(shape)) and torch.equal(bias, g.new_zeros(5))  # pyright: ignore


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_nan_and_inf_go_where_torch_lets_them(value, make):
    x, weight, g = make("ieee", 1, 6, 7, 8), make("ieee", 9, 6, 3, 3, fan_in=81), make("ieee", 1, 9, 7, 8)
    g[0, 2, 3, 4] = value
    conv = lambda x, weight: F.conv2d(x, weight, padding=1)
    check("ieee", kernels.conv_dgrad(g, weight, tf32=False), gradient(conv, 0), g, x, weight)
    check("ieee", wgrad(g, [x], 3, tf32=False), gradient(conv, 1), g, x, weight)
    got = kernels.upsample_bwd(g[:, :, 1:], 3, 4, mode="bilinear", align_corners=True)
    check("ieee", got, gradient(upsampled, 0), g[:, :, 1:], x[:, :1, :3, :4].expand(1, 9, 3, 4), 6, 8, "bilinear", True)


@pytest.mark.overflow
@pytest.mark.parametrize("axis", [0, 2], ids=["images", "rows"])
def test_offsets_beyond_2_to_31(axis, make):
    n = 3 if axis == 0 else 1
    x, g, weight = make("fp16", n, 8, 4, 4), make("fp16", n, 8, 4, 4), make("fp16", 8, 8, 3, 3, fan_in=72)
    far_x, far_g, conv = far_apart(x, axis), far_apart(g, axis), lambda x, weight: F.conv2d(x, weight, padding=1)
    check("fp16", wgrad(far_g, [far_x], 3), gradient(conv, 1), g, x, weight)
    check("fp16", wgrad(far_g, [far_x[:, :3]], 3), gradient(conv, 1), g, x[:, :3], weight[:, :3])
    pooled = make("fp16", n, 8, 2, 2)
    got = kernels.activation_bwd(far_g, pooled, x, slope=0.1, bias=False)[0]
    assert torch.equal(got, kernels.activation_bwd(g, pooled, x, slope=0.1, bias=False)[0])
    got = kernels.upsample_bwd(far_g, 2, 2, mode="bilinear", align_corners=False)
    assert torch.equal(got, kernels.upsample_bwd(g, 2, 2, mode="bilinear", align_corners=False))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 3), c=st.integers(1, 40), h=st.integers(2, 14), w=st.integers(2, 14), o=st.integers(1, 40),
    ksize=st.sampled_from([1, 3]), precision=st.sampled_from(PRECISIONS), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(n, c, h, w, o, ksize, precision, seed, make):
    torch.manual_seed(seed)
    x, g, weight = (
        make(precision, n, c, h, w),
        make(precision, n, o, h, w),
        make(precision, o, c, ksize, ksize, fan_in=o * ksize**2),
    )
    conv, tf32 = (lambda x, weight: F.conv2d(x, weight, padding=ksize // 2)), precision == "tf32"
    check(precision, kernels.conv_dgrad(g, weight, tf32=tf32), gradient(conv, 0), g, x, weight)
    check(precision, wgrad(g, [x], ksize, tf32=tf32), gradient(conv, 1), g, x, weight)
