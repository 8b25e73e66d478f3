"""Upsampling behind the channel mixing, as a CPU does it, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastunet import ops, reference
from fastunet.ops import commuted
from fastunet.parity import compare
from fastunet.parity.fuzz import fuzz

pytestmark = pytest.mark.usefixtures("poisoned")
MODES = st.sampled_from([("nearest", False), ("bilinear", False), ("bilinear", True)])


def check(n: int, c: int, h: int, w: int, height: int, width: int, mode: tuple[str, bool], slope: float) -> None:
    x, skip, weight = torch.randn(n, c, h, w), torch.randn(n, 3, height, width), torch.randn(5, c + 3, 3, 3)
    weight /= (9 * (c + 3)) ** 0.5
    arguments: list[Any] = [x, skip, weight, torch.randn(5)]
    options: Any = *mode, slope
    got = commuted.upsample_concat_conv2d_relu(*arguments, *options)
    truth = reference.upsample_concat_conv2d_relu(*(t.double() for t in arguments), *options)
    parity = compare(got, reference.upsample_concat_conv2d_relu(*arguments, *options), truth)
    assert parity.ok, str(parity)
    assert got.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 3), c=st.integers(1, 20), h=st.integers(1, 40), w=st.integers(1, 40),
    more=st.tuples(st.integers(-1, 2), st.integers(-1, 2)), mode=MODES, slope=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(n, c, h, w, more, mode, slope, seed):
    torch.manual_seed(seed)
    check(n, c, h, w, 2 * h + more[0], 2 * w + more[1], mode, slope)


@pytest.mark.parametrize("height, width", [(2, 150), (150, 2), (3, 70)], ids=str)
def test_blocks_of_padding_alone(height, width, seed):
    check(1, 4, 1, 3, height, width, ("bilinear", True), 0.0)
    check(2, 4, 40, 3, height, width, ("nearest", False), 0.0)  # and of a map that is cropped


@pytest.mark.parametrize("channels, calls", [(128, 1), (127, 0)], ids=str)
def test_wide_levels_take_it(channels, calls, monkeypatch, seed):
    """Called as an operator, of any strides, in inference mode and where gradients are wanted."""
    seen = []
    right = commuted.upsample_concat_conv2d_relu
    monkeypatch.setattr(commuted, "upsample_concat_conv2d_relu", lambda *a: seen.append(a) or right(*a))
    x, skip = torch.randn(2, channels, 3, 4), torch.randn(2, 8, 7, 5).transpose(2, 3)[:, ::2]
    weight = torch.randn(6, channels + 4, 3, 3) / channels**0.5
    expected = reference.upsample_concat_conv2d_relu(x, skip, weight, None, "bilinear", True, 0.0)
    with torch.inference_mode():
        torch.testing.assert_close(ops.upsample_concat_conv2d_relu(x, skip, weight), expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == calls

    def gradient(op: Any, *inputs: torch.Tensor) -> torch.Tensor:
        leaf = inputs[2].clone().requires_grad_()
        return torch.autograd.grad(op(inputs[0], inputs[1], leaf).square().sum(), leaf)[0]

    plain = lambda x, skip, w: reference.upsample_concat_conv2d_relu(x, skip, w, None, "bilinear", True, 0.0)
    found = gradient(ops.upsample_concat_conv2d_relu, x, skip, weight)
    assert len(seen) == 2 * calls
    truth = gradient(plain, x.double(), skip.double(), weight.double())
    pixels = skip[:, 0].numel()  # that a gradient sums over, behind forward and backward
    parity = compare(found, gradient(plain, x, skip, weight), truth, stages=2, summands=pixels)
    assert parity.ok, str(parity)


def test_random_networks_hold(monkeypatch):
    """Whose levels are narrow, as if they were wide."""
    monkeypatch.setattr(commuted, "_WIDE", 1)
    found = fuzz(20, 11)
    assert found.case is None, f"{found.case}\n{found.finding}"
