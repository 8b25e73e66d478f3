"""A bias of two rows, (2, O): factors of the channels' sums, in float32, and what is added then."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastunet import kernels
from fastunet.parity import compare
from fastunet.reference import conv2d_relu, upsample_concat_conv2d_relu

from .conftest import DTYPES, check, rounds_to_tf32
from .test_head import with_head

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def factors(seed, device):
    """factors(o): (2, O) float32, of either sign."""
    return lambda o: torch.randn(2, o, device=device)


def rounded_once(precision, got, function, *inputs):
    """By the rule, and no further from float64's than its result rounded once is."""
    check(precision, got, function, *inputs)
    truth = function(*(t.double().cpu() if isinstance(t, torch.Tensor) else t for t in inputs))
    once = truth.to(got.dtype).to(got.device)
    parity = compare(got, once, truth, tf32=rounds_to_tf32(precision, got))
    # A float32 sum rounds at each term: no element may be far off, but all are off by more than one rounding.
    held = parity.candidate_error <= parity.limit if got.dtype == torch.float32 else parity.ok
    assert held, str(parity)


@pytest.mark.parametrize("shape", [(2, 5, 9, 6, 17), (1, 64, 8, 8, 64), (3, 96, 4, 4, 96)], ids=str)
def test_conv_and_pool(shape, precision, make, factors):
    n, c, h, w, o = shape
    x, weight, bias = make(precision, n, c, h, w), make(precision, o, c, 3, 3, fan_in=9 * c), factors(o)
    y, pooled = kernels.conv_pool_fwd(x, weight, bias, slope=0.1, tf32=precision == "tf32")
    rounded_once(precision, y, conv2d_relu, x, weight, bias, 0.1)
    assert y.dtype == DTYPES[precision] and torch.equal(pooled, F.max_pool2d(y, 2))


def test_stem(precision, make, factors):
    x, weight, bias = make(precision, 2, 3, 9, 7), make(precision, 65, 3, 3, 3, fan_in=27), factors(65)
    y = kernels.stem_fwd(x, weight, bias, slope=0.0, tf32=precision == "tf32")
    rounded_once(precision, y, conv2d_relu, x, weight, bias, 0.0)


def test_head(precision, make, factors):
    x, weight, bias = make(precision, 2, 5, 6, 7), make(precision, 20, 5, 3, 3, fan_in=45), factors(20)
    head, of_head = make(precision, 3, 20, 1, 1, fan_in=20), make(precision, 3)
    got = kernels.conv_head_fwd(x, weight, bias, head, of_head, slope=0.1, tf32=precision == "tf32")
    check(precision, got, with_head, x, weight, bias, head, of_head, 0.1)


@pytest.mark.parametrize(
    "launch, mode, corners",
    [
        (kernels.upconcat_conv3x3_fwd, "bilinear", True),
        (kernels.upconcat_conv3x3_fwd, "nearest", False),
        (kernels.upconcat_conv3x3_fwd, "none", False),
        (kernels.upconcat_conv3x3_commuted_fwd, "bilinear", True),
        (kernels.upconcat_conv3x3_commuted_fwd, "nearest", False),
    ],
)
def test_two_sources(launch, mode, corners, precision, make, factors):
    x, skip = make(precision, 2, 17, 4, 3), make(precision, 2, 6, 9, 6)
    x = F.interpolate(x, scale_factor=2) if mode == "none" else x
    weight, bias = make(precision, 21, 23, 3, 3, fan_in=9 * 23), factors(21)
    y = launch(x, skip, weight, bias, mode=mode, align_corners=corners, slope=0.0, tf32=precision == "tf32")
    check(precision, y, upsample_concat_conv2d_relu, x, skip, weight, bias, mode, corners, 0.0)


def test_a_transposed_convolution_takes_none(make, factors):
    with pytest.raises(ValueError, match=r"bias: expected shape \(O,\), of a transposed convolution, got \(2, 5\)"):
        kernels.conv_transpose_fwd(make("fp16", 1, 8, 4, 3), make("fp16", 8, 5, 2, 2), factors(5))


def test_no_skip_comes_in(make, factors):
    x, skip, weight, bias = make("fp16", 1, 8, 4, 3), make("fp16", 1, 0, 8, 6), make("fp16", 5, 8, 3, 3), factors(5)
    y = kernels.upconcat_conv3x3_commuted_fwd(x, skip, weight, bias, mode="nearest", align_corners=False, slope=0.0)
    check("fp16", y, upsample_concat_conv2d_relu, x, skip, weight, bias, "nearest", False, 0.0)
