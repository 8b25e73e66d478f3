"""conv_head_fwd: a convolution and the 1x1 head behind it, in one pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastunet import kernels
from fastunet.reference import conv2d_relu

from .conftest import check

pytestmark = pytest.mark.usefixtures("poisoned")


def with_head(x, weight, bias, head, head_bias, slope):
    """In plain PyTorch, two operators one behind the other."""
    return F.conv2d(conv2d_relu(x, weight, bias, slope), head, head_bias)


def tensors(make, precision, n, c, h, w, o, classes):
    x, weight, bias = make(precision, n, c, h, w), make(precision, o, c, 3, 3, fan_in=9 * c), make(precision, o)
    return x, weight, bias, make(precision, classes, o, 1, 1, fan_in=o), make(precision, classes)


def check_head(make, precision, *shape, slope=0.0):
    given = tensors(make, precision, *shape)
    logits = kernels.conv_head_fwd(*given, slope=slope, tf32=precision == "tf32")
    check(precision, logits, with_head, *given, slope, stages=2)


@pytest.mark.parametrize(
    "shape",
    [(1, 5, 5, 7, 3, 2), (2, 17, 3, 18, 33, 1), (1, 64, 17, 9, 64, 16)],
    ids=["odd-everything", "channels-not-of-16-bytes", "tma"],
)
def test_conv_and_head(shape, precision, make):
    check_head(make, precision, *shape)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 2),
    c=st.integers(1, 20),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    o=st.integers(1, 40),
    classes=st.integers(1, 16),
)
def test_any_shape(n, c, h, w, o, classes, make):
    check_head(make, "fp16", n, c, h, w, o, classes, slope=0.1)


def test_no_bias(make):
    x, weight, _, head, _ = tensors(make, "bf16", 1, 6, 4, 5, 10, 3)
    logits = kernels.conv_head_fwd(x, weight, None, head, None, slope=0.0)
    check("bf16", logits, with_head, x, weight, None, head, None, 0.0, stages=2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "minus-inf"])
def test_nan_and_inf_go_where_torch_lets_them(value, make):
    """Also where a tile has rows without a channel, which make NaN of an infinite x."""
    x, weight, bias, head, head_bias = tensors(make, "ieee", 1, 2, 6, 6, 3, 2)
    weight, head = weight.abs(), head.abs()
    x[0, 1, 2, 3] = value
    logits = kernels.conv_head_fwd(x, weight, bias, head, head_bias, slope=0.0, tf32=False)
    check("ieee", logits, with_head, x, weight, bias, head, head_bias, 0.0, stages=2)
    assert value == -torch.inf or not logits.isfinite().all()


@pytest.mark.parametrize("o, classes", [(65, 2), (8, 17)])
def test_what_no_tile_holds_is_refused(o, classes, make):
    given = tensors(make, "fp16", 1, 4, 4, 4, o, classes)
    expected = rf"head: expected at most 16 classes of 64 channels, got \({classes}, {o}, 1, 1\)"
    with pytest.raises(ValueError, match=expected):
        kernels.conv_head_fwd(*given, slope=0.0)


def test_empty_batch(make):
    given = tensors(make, "fp16", 0, 4, 4, 6, 8, 2)
    assert kernels.conv_head_fwd(*given, slope=0.0).shape == (0, 2, 4, 6)
