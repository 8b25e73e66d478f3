"""Strides, filters without zeros around the map, and transposed convolutions of any stride: forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastunet import kernels, reference
from fastunet.kernels.tensors import unit_channel_stride
from fastunet.kernels.tuning import HOPPER, conv_config

from ..conftest import COMPILED
from .conftest import PRECISIONS, check, far_apart
from .test_backward import check_bias, gradient, repeated

pytestmark = pytest.mark.usefixtures("poisoned")


# On tensor cores and off them, where that can be; dtypes are the other files'.
@pytest.fixture(params=["fp16", "tf32" if COMPILED else "ieee"])
def precision(request):
    return request.param


# (stride, pad): oblong, and longer than the filter's reach, too.
GEOMETRIES = [((2, 2), 1), ((1, 2), 1), ((3, 4), 1), ((1, 1), 0), ((2, 1), 0)]
# (N, C, H, W, O): each for a reason.
SHAPES = [
    pytest.param((2, 3, 5, 7, 5), id="image"),
    pytest.param((1, 17, 7, 5, 18), id="odd-everything"),
]
TMA_SHAPE = 3, 64, 5, 4, 64  # several images a tile


def check_convolution(shape, ksize, stride, pad, precision, make):
    (n, c, h, w, o), tf32 = shape, precision == "tf32"
    x, weight = make(precision, n, c, h, w), make(precision, o, c, ksize, ksize, fan_in=ksize**2 * c)
    bias = make(precision, o)
    conv = lambda x, weight, bias=None: F.conv2d(x, weight, bias, stride, pad)
    options: Any = {"stride": stride, "pad": pad, "tf32": tf32}
    leaky = lambda *a: F.leaky_relu(conv(*a), 0.1)
    y = kernels.conv_fwd(x, weight, bias, slope=0.1, **options)
    check(precision, y, leaky, x, weight, bias)
    if c <= kernels.STEM_CHANNELS and ksize == 3:
        check(precision, kernels.stem_fwd(x, weight, bias, slope=0.1, **options), leaky, x, weight, bias)
    g = make(precision, *y.shape)
    got = repeated(lambda: kernels.conv_dgrad(g, weight, size=(h, w), **options))
    check(precision, got, gradient(conv, 0), g, x, weight)
    got = repeated(lambda: kernels.conv_wgrad(g, [x], ksize, bias=False, **options)[0])
    check(precision, got, gradient(conv, 1), g, x, weight)
    check_bias(precision, lambda bias: kernels.conv_wgrad(g, [x], ksize, bias=bias, **options), g)


@pytest.mark.parametrize("stride, pad", GEOMETRIES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_convolution(shape, stride, pad, precision, make):
    check_convolution(shape, 3, stride, pad, precision, make)


@pytest.mark.parametrize("stride, pad", GEOMETRIES, ids=str)
def test_convolution_of_boxes(stride, pad, make):
    check_convolution(TMA_SHAPE, 3, stride, pad, "fp16", make)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 2), c=st.integers(1, 20), h=st.integers(3, 12), w=st.integers(3, 12), o=st.integers(1, 20),
    ksize=st.sampled_from([1, 3]), stride=st.tuples(st.integers(1, 4), st.integers(1, 4)), padded=st.booleans(),
    precision=st.sampled_from(PRECISIONS), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_convolution(n, c, h, w, o, ksize, stride, padded, precision, seed, make):
    torch.manual_seed(seed)
    check_convolution((n, c, h, w, o), ksize, stride, ksize // 2 if padded else 0, precision, make)


@pytest.mark.parametrize("shape", SHAPES)
def test_pool_of_an_unpadded_convolution(shape, precision, make):
    n, c, h, w, o = shape
    x, weight, bias = make(precision, n, c, h, w), make(precision, o, c, 3, 3, fan_in=9 * c), make(precision, o)
    y, pooled = kernels.conv_pool_fwd(x, weight, bias, slope=0.0, pad=0, tf32=precision == "tf32")
    check(precision, y, lambda *a: F.conv2d(*a).relu(), x, weight, bias)
    assert torch.equal(pooled, F.max_pool2d(y, 2))


@pytest.mark.parametrize("mode", [("bilinear", True), ("nearest", False), ("none", False)], ids=str)
@pytest.mark.parametrize(
    "channels, size",
    [((5, 3, 6), (5, 8)), ((18, 7, 6), (7, 6)), ((64, 64, 64), (5, 9)), ((64, 64, 64), (8, 7))],
    ids=["cropped", "padded", "tma", "tma-padded"],
)
def test_two_unpadded_sources(channels, size, mode, precision, make):
    (c1, c2, o), (up, corners), tf32 = channels, mode, precision == "tf32"
    if o == 64 and precision == "fp16":
        assert conv_config((c1, c2), o, size[0] - 2, size[1] - 2, torch.float16, HOPPER, tma=True).tma
    x, skip = make(precision, 1, c1, *((6, 8) if up == "none" else (3, 4))), make(precision, 1, c2, *size)
    weight = make(precision, o, c1 + c2, 3, 3, fan_in=9 * (c1 + c2))

    def conv(x, skip, weight):
        return reference.upsample_concat_conv2d_relu(x, skip, weight, None, up, corners, 1.0, "valid")

    how: Any = {"mode": up, "align_corners": corners}
    y = kernels.upconcat_conv3x3_fwd(x, skip, weight, None, slope=1.0, pad=0, tf32=tf32, **how)
    check(precision, y, conv, x, skip, weight)
    if up == "none":
        g = make(precision, *y.shape)
        got = repeated(lambda: kernels.conv_wgrad(g, [x, skip], 3, bias=False, pad=0, tf32=tf32)[0])
        check(precision, got, gradient(conv, 2), g, x, skip, weight)
        alone = lambda x, weight: F.conv2d(reference.pad_to(x, *size), weight)  # no skip comes in
        got = kernels.conv_wgrad(g, [x], 3, bias=False, pad=0, size=size, tf32=tf32)[0]
        check(precision, got, gradient(alone, 1), g, x, weight[:, :c1])


@pytest.mark.parametrize("filter_size", [(1, 2), (3, 2), (4, 1), (1, 1)], ids=str)
def test_conv_transpose(filter_size, precision, make):
    n, c, h, w, o = (1, 64, 4, 5, 64) if precision == "fp16" else (2, 5, 3, 7, 4)  # TMA, or not
    (rows, columns), tf32 = filter_size, precision == "tf32"
    x, weight, bias = make(precision, n, c, h, w), make(precision, c, o, rows, columns, fan_in=c), make(precision, o)
    conv = lambda x, weight, bias=None: F.conv_transpose2d(x, weight, bias, stride=filter_size)
    check(precision, kernels.conv_transpose_fwd(x, weight, bias, tf32=tf32), conv, x, weight, bias)
    g = make(precision, n, o, rows * h, columns * w)
    got = repeated(lambda: kernels.conv_transpose_dgrad(g, weight, tf32=tf32))
    check(precision, got, gradient(conv, 0), g, x, weight)
    launch = lambda bias: kernels.conv_transpose_wgrad(g, x, bias=bias, tf32=tf32)
    check(precision, repeated(lambda: launch(False)[0]), gradient(conv, 1), g, x, weight)
    check_bias(precision, launch, g)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("stride, pad", GEOMETRIES, ids=str)
def test_nan_and_inf_go_where_torch_lets_them(stride, pad, value, make):
    x, weight = make("ieee", 1, 6, 9, 8), make("ieee", 5, 6, 3, 3, fan_in=54)
    conv = lambda x, weight: F.conv2d(x, weight, None, stride, pad)
    options: Any = {"stride": stride, "pad": pad, "tf32": False}
    g = conv(x, weight)
    x[0, 2, 3, 4], g[0, 1, 1, 1] = value, value
    check("ieee", kernels.conv_fwd(x, weight, None, slope=1.0, **options), conv, x, weight)
    check("ieee", kernels.conv_dgrad(g, weight, size=(9, 8), **options), gradient(conv, 0), g, x, weight)


@pytest.mark.overflow
@pytest.mark.parametrize("axis", [0, 2], ids=["images", "rows"])
@pytest.mark.parametrize("stride, pad", [((2, 2), 1), ((1, 1), 0)], ids=str)
def test_offsets_beyond_2_to_31(stride, pad, axis, make):
    h = 5 if axis == 0 else 9
    x, weight = make("fp16", 3 if axis == 0 else 1, 8, h, 4), make("fp16", 8, 8, 3, 3, fan_in=72)
    conv = lambda x, weight: F.conv2d(x, weight, None, stride, pad)
    y = kernels.conv_fwd(far_apart(x, axis), weight, None, slope=1.0, stride=stride, pad=pad)
    check("fp16", y, conv, x, weight)
    g = make("fp16", *y.shape)
    far_g = far_apart(g, axis)
    assert unit_channel_stride(far_g) is far_g  # or a copy would be read
    got = kernels.conv_dgrad(far_g, weight, stride=stride, pad=pad, size=(h, 4))
    check("fp16", got, gradient(conv, 0), g, x, weight)
    got = kernels.conv_wgrad(far_g, [far_apart(x, axis)], 3, bias=False, stride=stride, pad=pad)[0]
    check("fp16", got, gradient(conv, 1), g, x, weight)


def test_boxes_of_a_stride_are_refused(make):
    n, c, h, w, o = TMA_SHAPE
    config = conv_config((c,), o, h, w, torch.float16, HOPPER, tma=True)
    assert config.tma
    with pytest.raises(ValueError, match="config: expected one of pointers, for a stride of"):
        kernels.conv_fwd(
            make("fp16", n, c, h, w), make("fp16", o, c, 3, 3), None, slope=1.0, stride=(2, 2), config=config
        )


def test_an_empty_batch(make):
    x, g, weight = make("fp16", 0, 8, 5, 6), make("fp16", 0, 5, 3, 3), make("fp16", 5, 8, 3, 3)
    assert kernels.conv_fwd(x, weight, None, slope=0.0, stride=(2, 2)).shape == g.shape
    assert kernels.conv_dgrad(g, weight, stride=(2, 2), size=(5, 6)).shape == x.shape
    assert torch.equal(kernels.conv_wgrad(g, [x], 3, bias=False, stride=(2, 2))[0], torch.zeros_like(weight))
