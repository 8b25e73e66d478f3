"""conv_fwd and stem_fwd: convolution, bias, activation, pool."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastunet import kernels
from fastunet.reference import conv2d_relu

from .conftest import PRECISIONS, WITHOUT_IEEE, check, far_apart

pytestmark = pytest.mark.usefixtures("poisoned")

# (N, C, H, W, O): each for a reason. float32 without tf32 has one kind of tile and no TMA, so the
# shapes that pick between tiles are left out of it.
SHAPES = [
    pytest.param((1, 1, 5, 7, 3), id="one-channel"),
    pytest.param((2, 5, 9, 6, 17), id="odd-everything"),
    pytest.param((1, 17, 3, 18, 64), id="channels-not-of-16-bytes"),
]
TILE_SHAPES = [
    pytest.param((1, 64, 17, 9, 64), id="tma-256-pixel-tile"),
    pytest.param((3, 96, 4, 4, 96), id="tma-several-images-a-tile"),
    pytest.param((1, 64, 9, 17, 130), id="tma-two-channel-tiles"),
]


def check_conv_relu_pool(shape, precision, make):
    n, c, h, w, o = shape
    x, weight, bias = make(precision, n, c, h, w), make(precision, o, c, 3, 3, fan_in=9 * c), make(precision, o)
    y, pooled = kernels.conv_pool_fwd(x, weight, bias, slope=0.0, tf32=precision == "tf32")
    check(precision, y, conv2d_relu, x, weight, bias, 0.0)
    check(precision, pooled, lambda *a: F.max_pool2d(conv2d_relu(*a), 2), x, weight, bias, 0.0)
    assert torch.equal(pooled, F.max_pool2d(y, 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_conv_relu_pool(shape, precision, make):
    check_conv_relu_pool(shape, precision, make)


@pytest.mark.parametrize("precision", WITHOUT_IEEE, indirect=True)
@pytest.mark.parametrize("shape", TILE_SHAPES)
def test_conv_relu_pool_tiles(shape, precision, make):
    check_conv_relu_pool(shape, precision, make)


@pytest.mark.parametrize("slope", [1.0, 0.1], ids=["no-activation", "leaky"])
@pytest.mark.parametrize("shape", [(2, 5, 4, 6, 7), (1, 64, 8, 8, 64)], ids=["pointers", "tma"])
def test_no_bias_and_other_activations(shape, slope, make):
    n, c, h, w, o = shape
    x, weight = make("fp16", n, c, h, w), make("fp16", o, c, 3, 3, fan_in=9 * c)
    y = kernels.conv_fwd(x, weight, None, slope=slope)
    check("fp16", y, conv2d_relu, x, weight, None, slope)


@pytest.mark.parametrize("o", [1, 2, 5, 21], ids=lambda o: f"{o}-classes")
def test_head(o, precision, make):
    x, weight, bias = make(precision, 2, 64, 5, 7), make(precision, o, 64, 1, 1, fan_in=64), make(precision, o)
    y = kernels.conv_fwd(x, weight, bias, slope=1.0, tf32=precision == "tf32")
    check(precision, y, conv2d_relu, x, weight, bias, 1.0)


@pytest.mark.parametrize("c", [1, 2, 3, 4], ids=lambda c: f"{c}-channels")
def test_stem(c, precision, make):
    x, weight, bias = make(precision, 2, c, 9, 19), make(precision, 65, c, 3, 3, fan_in=9 * c), make(precision, 65)
    y = kernels.stem_fwd(x, weight, bias, slope=0.0, tf32=precision == "tf32")
    check(precision, y, conv2d_relu, x, weight, bias, 0.0)


STRIDES = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every-second-pixel": lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, 1::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one-image-repeated": lambda x: x[:1].expand(2, -1, -1, -1),
    "some-channels": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
}


@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("c", [3, 16], ids=["stem", "conv"])
def test_any_strides(layout, c, make):
    x, weight = STRIDES[layout](make("bf16", 2, c, 5, 6)), make("bf16", 16, c, 3, 3, fan_in=9 * c)
    y = kernels.stem_fwd(x, weight, None, slope=0.0) if c == 3 else kernels.conv_fwd(x, weight, None, slope=0.0)
    check("bf16", y, conv2d_relu, x, weight, None, 0.0)


def test_a_strided_bias(make):
    x, weight, bias = make("fp16", 1, 5, 4, 4), make("fp16", 7, 5, 3, 3, fan_in=45), make("fp16", 7, 2)[:, 0]
    check("fp16", kernels.conv_fwd(x, weight, bias, slope=0.0), conv2d_relu, x, weight, bias, 0.0)
    check(
        "fp16",
        kernels.stem_fwd(x[:, :3], weight[:, :3], bias, slope=0.0),
        conv2d_relu,
        x[:, :3],
        weight[:, :3],
        bias,
        0.0,
    )


def test_empty_batch(make):
    y, pooled = kernels.conv_pool_fwd(make("fp16", 0, 8, 4, 6), make("fp16", 5, 8, 3, 3), None, slope=0.0)
    assert y.shape == (0, 5, 4, 6) and pooled.shape == (0, 5, 2, 3)
    assert kernels.stem_fwd(make("fp16", 0, 3, 4, 6), make("fp16", 5, 3, 3, 3), None, slope=0.0).shape == (0, 5, 4, 6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "minus-inf"])
def test_nan_and_inf_go_where_torch_lets_them(value, precision, make):
    tf32 = precision == "tf32"
    x, weight, bias = make(precision, 1, 6, 7, 8), make(precision, 9, 6, 3, 3, fan_in=54), make(precision, 9)
    x[0, 2, 3, 4] = value
    y, pooled = kernels.conv_pool_fwd(x, weight, bias, slope=0.0, tf32=tf32)
    check(precision, y, _summed_in_float32, x, weight, bias)
    check(precision, pooled, lambda *a: F.max_pool2d(_summed_in_float32(*a), 2), x, weight, bias)
    x, weight = x[:, :3], weight[:, :3]
    y = kernels.stem_fwd(x, weight, bias, slope=0.0, tf32=tf32)
    check(precision, y, _summed_in_float32, x, weight, bias)


def _summed_in_float32(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """With AVX512-BF16, PyTorch's own bfloat16 lets a NaN reach pixels that no tap takes it to."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return conv2d_relu(x.to(wide), weight.to(wide), bias.to(wide), 0.0).to(x.dtype)


@pytest.mark.overflow
@pytest.mark.parametrize("axis", [0, 2], ids=["images", "rows"])
def test_offsets_beyond_2_to_31(axis, make):
    x, weight = make("fp16", 3 if axis == 0 else 1, 8, 4, 3), make("fp16", 8, 8, 3, 3, fan_in=72)
    far = far_apart(x, axis)
    y, pooled = kernels.conv_pool_fwd(far, weight, None, slope=0.0)
    check("fp16", y, conv2d_relu, x, weight, None, 0.0)
    assert torch.equal(pooled, F.max_pool2d(y, 2))
    y = kernels.stem_fwd(far[:, :3], weight[:, :3], None, slope=0.0)
    check("fp16", y, conv2d_relu, x[:, :3], weight[:, :3], None, 0.0)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 3), c=st.integers(1, 40), h=st.integers(2, 19), w=st.integers(2, 19), o=st.integers(1, 40),
    ksize=st.sampled_from([1, 3]), precision=st.sampled_from(PRECISIONS), bias=st.booleans(),
    slope=st.sampled_from([0.0, 0.2, 1.0]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(n, c, h, w, o, ksize, precision, bias, slope, seed, make):
    torch.manual_seed(seed)
    x, weight = make(precision, n, c, h, w), make(precision, o, c, ksize, ksize, fan_in=c * ksize**2)
    b = make(precision, o) if bias else None
    y, pooled = kernels.conv_pool_fwd(x, weight, b, slope=slope, tf32=precision == "tf32")
    check(precision, y, conv2d_relu, x, weight, b, slope)
    assert torch.equal(pooled, F.max_pool2d(y, 2))


@pytest.mark.cuda
@pytest.mark.slow
def test_output_beyond_2_to_31(make):
    """2.4 G elements out: the last pixels must be the ones a small convolution of that corner gives."""
    x, weight = make("fp16", 1, 8, 6144, 6144), make("fp16", 64, 8, 3, 3, fan_in=72)
    y = kernels.conv_fwd(x, weight, None, slope=0.0)
    corner = x[:, :, -9:, -9:]
    check("fp16", y[:, :, -8:, -8:].contiguous(memory_format=torch.channels_last),
          lambda *a: conv2d_relu(*a)[:, :, 1:, 1:], corner, weight, None, 0.0)  # fmt: skip
