"""upsample_concat_fwd, upconcat_conv3x3_fwd and conv_transpose_fwd: the decoder's kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastunet import kernels, reference

from .conftest import PRECISIONS, WITHOUT_IEEE, check, far_apart
from .test_conv import STRIDES

pytestmark = pytest.mark.usefixtures("poisoned")

MODES = [
    pytest.param(("nearest", False), id="nearest"),
    pytest.param(("bilinear", False), id="bilinear"),
    pytest.param(("bilinear", True), id="bilinear-corners"),
]
# (N, C1, h, w), (C2, H, W): each for a reason.
SOURCES = [
    pytest.param((2, 3, 4, 5), (2, 8, 10), id="exact-double"),
    pytest.param((1, 17, 3, 4), (5, 7, 9), id="odd-skip-padded"),
    pytest.param((1, 1, 1, 1), (1, 2, 2), id="one-pixel"),
    pytest.param((1, 2, 4, 4), (3, 6, 7), id="smaller-skip-crops"),
    pytest.param((1, 72, 1, 5), (3, 3, 10), id="more-channels-than-a-block"),
    pytest.param((1, 3, 3, 2), (0, 7, 4), id="no-skip"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("x_shape, skip_shape", SOURCES)
def test_upsample_concat(x_shape, skip_shape, mode, precision, make):
    x, skip = make(precision, *x_shape), make(precision, x_shape[0], *skip_shape)
    y = kernels.upsample_concat_fwd(x, skip, mode=mode[0], align_corners=mode[1])
    check(precision, y, reference.upsample_concat, x, skip, *mode)


def test_weights_stay_exact_on_a_long_axis(make):
    """At 5,000 pixels torch's float32 coordinates are off by 1e-4 of a pixel; ours by 1e-7."""
    x, skip = make("ieee", 1, 1, 1, 5000), make("ieee", 1, 1, 2, 10000)
    y = kernels.upsample_concat_fwd(x, skip, mode="bilinear", align_corners=True)
    truth = reference.upsample(x.double().cpu(), "bilinear", True)
    assert (y[:, :1].double().cpu() - truth).abs().max() < 4e-7 * truth.abs().max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("x_shape, skip_shape", SOURCES)
def test_upsample_concat_conv(x_shape, skip_shape, mode, precision, make):
    c, o = x_shape[1] + skip_shape[0], 6
    x, skip = make(precision, *x_shape), make(precision, x_shape[0], *skip_shape)
    weight, bias = make(precision, o, c, 3, 3, fan_in=9 * c), make(precision, o)
    y = kernels.upconcat_conv3x3_fwd(
        x, skip, weight, bias, mode=mode[0], align_corners=mode[1], slope=0.0, tf32=precision == "tf32"
    )
    check(precision, y, reference.upsample_concat_conv2d_relu, x, skip, weight, bias, *mode, 0.0)


@pytest.mark.parametrize("precision", WITHOUT_IEEE, indirect=True)  # the products are tested with the convolution
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("x_shape, skip_shape", SOURCES)
def test_upsampling_behind_the_products(x_shape, skip_shape, mode, precision, make):
    c, o = x_shape[1] + skip_shape[0], 6
    x, skip = make(precision, *x_shape), make(precision, x_shape[0], *skip_shape)
    weight, bias = make(precision, o, c, 3, 3, fan_in=9 * c), make(precision, o)
    options = {"mode": mode[0], "align_corners": mode[1], "slope": 0.1, "tf32": precision == "tf32"}
    y = kernels.upconcat_conv3x3_commuted_fwd(x, skip, weight, bias, **options)
    check(precision, y, reference.upsample_concat_conv2d_relu, x, skip, weight, bias, *mode, 0.1)


@pytest.mark.parametrize("precision", WITHOUT_IEEE, indirect=True)  # float32 without tf32 never takes TMA
@pytest.mark.parametrize(
    "x_shape, skip_shape, o",
    [
        pytest.param((2, 5, 6, 8), (3, 7, 9), 6, id="pointers-odd-skip"),
        pytest.param((1, 64, 8, 8), (64, 9, 8), 64, id="tma-odd-skip"),
        pytest.param((1, 64, 8, 8), (64, 7, 8), 64, id="cropped"),
    ],
)
def test_two_sources_without_upsampling(x_shape, skip_shape, o, precision, make):
    c = x_shape[1] + skip_shape[0]
    x, skip = make(precision, *x_shape), make(precision, x_shape[0], *skip_shape)
    weight = make(precision, o, c, 3, 3, fan_in=9 * c)
    y = kernels.upconcat_conv3x3_fwd(
        x, skip, weight, None, mode="none", align_corners=False, slope=0.1, tf32=precision == "tf32"
    )
    check(precision, y, reference.upsample_concat_conv2d_relu, x, skip, weight, None, "none", False, 0.1)


@pytest.mark.parametrize(
    "shape", [(2, 5, 3, 7, 4), (1, 64, 5, 8, 64), (1, 17, 4, 4, 96)], ids=["small", "tma", "odd-channels"]
)
def test_conv_transpose(shape, precision, make):
    n, c, h, w, o = shape
    x, weight, bias = make(precision, n, c, h, w), make(precision, c, o, 2, 2, fan_in=c), make(precision, o)
    y = kernels.conv_transpose_fwd(x, weight, bias, tf32=precision == "tf32")
    check(precision, y, reference.conv_transpose2x2, x, weight, bias)


@pytest.mark.parametrize("layout", STRIDES)
def test_any_strides(layout, make):
    x, skip = STRIDES[layout](make("fp16", 2, 8, 3, 4)), STRIDES[layout](make("fp16", 2, 8, 6, 8))
    weight, transpose = make("fp16", 8, 16, 3, 3, fan_in=144), make("fp16", 8, 8, 2, 2, fan_in=8)
    y = kernels.upsample_concat_fwd(x, skip, mode="bilinear", align_corners=True)
    check("fp16", y, reference.upsample_concat, x, skip, "bilinear", True)
    y = kernels.upconcat_conv3x3_fwd(x, skip, weight, None, mode="bilinear", align_corners=False, slope=0.0)
    check("fp16", y, reference.upsample_concat_conv2d_relu, x, skip, weight, None, "bilinear", False, 0.0)
    check("fp16", kernels.conv_transpose_fwd(x, transpose, None), reference.conv_transpose2x2, x, transpose, None)


def test_empty_batch(make):
    x, skip, weight = make("fp16", 0, 4, 3, 3), make("fp16", 0, 2, 6, 6), make("fp16", 5, 6, 3, 3)
    assert kernels.upsample_concat_fwd(x, skip, mode="nearest", align_corners=False).shape == (0, 6, 6, 6)
    y = kernels.upconcat_conv3x3_fwd(x, skip, weight, None, mode="nearest", align_corners=False, slope=0.0)
    assert y.shape == (0, 5, 6, 6)
    y = kernels.upconcat_conv3x3_commuted_fwd(x, skip, weight, None, mode="nearest", align_corners=False, slope=0.0)
    assert y.shape == (0, 5, 6, 6)
    assert kernels.conv_transpose_fwd(x, make("fp16", 4, 7, 2, 2), None).shape == (0, 7, 6, 6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_nan_and_inf_in_the_skip(value, make):
    x, skip = make("ieee", 1, 4, 3, 4), make("ieee", 1, 3, 6, 8)
    weight, bias = make("ieee", 5, 7, 3, 3, fan_in=63), make("ieee", 5)
    skip[0, 1, 2, 3] = value
    y = kernels.upconcat_conv3x3_fwd(x, skip, weight, bias, mode="bilinear", align_corners=True, slope=0.0, tf32=False)
    check("ieee", y, reference.upsample_concat_conv2d_relu, x, skip, weight, bias, "bilinear", True, 0.0)


def test_nan_in_the_upsampled_map(precision, make):
    x, skip, transpose = make(precision, 1, 4, 3, 4), make(precision, 1, 3, 7, 8), make(precision, 4, 5, 2, 2, fan_in=4)
    weight = make(precision, 5, 7, 3, 3, fan_in=63)
    x[0, 1, 1, 2] = torch.nan
    tf32 = precision == "tf32"
    y = kernels.upsample_concat_fwd(x, skip, mode="bilinear", align_corners=False)
    check(precision, y, reference.upsample_concat, x, skip, "bilinear", False)
    y = kernels.upconcat_conv3x3_fwd(x, skip, weight, None, mode="bilinear", align_corners=False, slope=0.0, tf32=tf32)
    check(precision, y, reference.upsample_concat_conv2d_relu, x, skip, weight, None, "bilinear", False, 0.0)
    check(
        precision,
        kernels.conv_transpose_fwd(x, transpose, None, tf32=tf32),
        reference.conv_transpose2x2,
        x,
        transpose,
        None,
    )


@pytest.mark.overflow
@pytest.mark.parametrize("axis", [0, 2], ids=["images", "rows"])
@pytest.mark.parametrize("source", ["x", "skip"])
@pytest.mark.parametrize("mode", MODES)
def test_offsets_beyond_2_to_31(mode, source, axis, make):
    n = 3 if axis == 0 else 1
    x, skip, weight = make("fp16", n, 8, 4, 3), make("fp16", n, 8, 8, 6), make("fp16", 8, 16, 3, 3, fan_in=144)
    far, far_skip = (far_apart(x, axis), skip) if source == "x" else (x, far_apart(skip, axis))
    mode, corners = mode
    y = kernels.upsample_concat_fwd(far, far_skip, mode=mode, align_corners=corners)
    check("fp16", y, reference.upsample_concat, x, skip, mode, corners)
    for launcher in (kernels.upconcat_conv3x3_fwd, kernels.upconcat_conv3x3_commuted_fwd):
        y = launcher(far, far_skip, weight, None, mode=mode, align_corners=corners, slope=0.0)
        check("fp16", y, reference.upsample_concat_conv2d_relu, x, skip, weight, None, mode, corners, 0.0)


@pytest.mark.overflow
@pytest.mark.parametrize("axis", [0, 2], ids=["images", "rows"])
def test_offsets_beyond_2_to_31_of_what_is_upsampled_already(axis, make):
    n = 3 if axis == 0 else 1
    x, skip, weight = make("fp16", n, 8, 4, 3), make("fp16", n, 8, 4, 3), make("fp16", 8, 16, 3, 3, fan_in=144)
    y = kernels.upconcat_conv3x3_fwd(
        far_apart(x, axis), far_apart(skip, axis), weight, None, mode="none", align_corners=False, slope=0.0
    )
    check("fp16", y, reference.conv2d_relu, torch.cat([x, skip], 1), weight, None, 0.0)
    weight = make("fp16", 8, 8, 2, 2, fan_in=32)
    y = kernels.conv_transpose_fwd(far_apart(x, axis), weight, None)
    check("fp16", y, reference.conv_transpose2x2, x, weight, None)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 2), c1=st.integers(1, 20), c2=st.integers(1, 20), h=st.integers(1, 7), w=st.integers(1, 7),
    extra=st.tuples(st.integers(-1, 2), st.integers(-1, 2)), o=st.integers(1, 20),
    mode=st.sampled_from(["bilinear", "nearest"]), align_corners=st.booleans(), precision=st.sampled_from(PRECISIONS),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(n, c1, c2, h, w, extra, o, mode, align_corners, precision, seed, make):
    torch.manual_seed(seed)
    x, skip = make(precision, n, c1, h, w), make(precision, n, c2, 2 * h + extra[0], 2 * w + extra[1])
    weight, bias = make(precision, o, c1 + c2, 3, 3, fan_in=9 * (c1 + c2)), make(precision, o)
    y = kernels.upsample_concat_fwd(x, skip, mode=mode, align_corners=align_corners)
    check(precision, y, reference.upsample_concat, x, skip, mode, align_corners)
    y = kernels.upconcat_conv3x3_fwd(
        x, skip, weight, bias, mode=mode, align_corners=align_corners, slope=0.0, tf32=precision == "tf32"
    )
    check(precision, y, reference.upsample_concat_conv2d_relu, x, skip, weight, bias, mode, align_corners, 0.0)
