"""Bad input is named; a choice has its reason."""

from __future__ import annotations

import pytest
import torch

from fastunet import dispatch, ops


def zeros(*shapes, **options):
    return tuple(torch.zeros(shape, **options) for shape in shapes)


X, W = (1, 3, 4, 4), (2, 3, 3, 3)


def headed(head, head_bias=None, **options):
    return ops.conv2d_relu_head(torch.zeros(X), torch.zeros(W), None, torch.zeros(head, **options), head_bias)


BAD = {
    "rank": (lambda: ops.conv2d_relu(*zeros((3, 4, 4), W)), r"x: expected shape \(N, C, H, W\), .*got \(3, 4, 4\)"),
    "no channel": (
        lambda: ops.conv2d_relu(*zeros((1, 0, 4, 4), (2, 0, 3, 3))),
        r"x: .* at least 1, got \(1, 0, 4, 4\)",
    ),
    "no pixel": (lambda: ops.conv2d_relu(*zeros((1, 3, 0, 4), W)), r"x: .* at least 1, got \(1, 3, 0, 4\)"),
    "no filter": (lambda: ops.conv2d_relu(*zeros(X, (0, 3, 3, 3))), r"weight: .*O at least 1, got \(0, 3, 3, 3\)"),
    "no pixel of a skip": (
        lambda: ops.upsample_concat(*zeros(X, (1, 3, 8, 0))),
        r"skip: .*H and W at least 1, got \(1, 3, 8, 0\)",
    ),
    "empty source": (lambda: ops.upsample_concat(*zeros((1, 0, 4, 4), X)), r"x: .* at least 1, got \(1, 0, 4, 4\)"),
    "filter": (lambda: ops.conv2d_relu(*zeros(X, (1, 3, 5, 5))), "weight: expected a 1x1 or 3x3 filter, got .*5, 5"),
    "channels": (
        lambda: ops.conv2d_relu(*zeros(X, (1, 2, 3, 3))),
        "weight: expected 3 input channels, got .*1, 2, 3, 3",
    ),
    "dtype": (
        lambda: ops.conv2d_relu(*zeros(X), *zeros(W, dtype=torch.float16)),
        "weight: expected x's dtype torch.float32, got torch.float16",
    ),
    "device": (
        lambda: ops.conv2d_relu(*zeros(X), *zeros(W, device="meta")),
        "weight: expected x's device cpu, got meta",
    ),
    "bias": (lambda: ops.conv2d_relu(*zeros(X, W, (3,))), r"bias: expected shape \(2,\) or \(2, 2\), got \(3,\)"),
    "factors": (lambda: ops.conv2d_relu(*zeros(X, W, (3, 2))), r"bias: expected shape .* \(2, 2\), got \(3, 2\)"),
    "factors of another dtype": (
        lambda: ops.conv2d_relu(*zeros(X, W), *zeros((2, 2), dtype=torch.float16)),
        "bias: expected float32 or x's dtype torch.float32, got torch.float16",
    ),
    "factors elsewhere": (
        lambda: ops.conv2d_relu(*zeros(X, W), *zeros((2, 2), device="meta")),
        "bias: expected x's device cpu, got meta",
    ),
    "factors and gradients": (
        lambda: ops.conv2d_relu(zeros(X)[0].requires_grad_(), *zeros(W, (2, 2))),
        r"bias: expected shape \(O,\), without factors, where gradients are wanted, got \(2, 2\)",
    ),
    "slope": (
        lambda: ops.conv2d_relu(*zeros(X, W), negative_slope=1.5),
        r"negative_slope: expected a number in \[0, 1\), got 1.5",
    ),
    "pool": (
        lambda: ops.conv2d_relu(*zeros((1, 3, 1, 4), W), pool=True),
        "x: expected H and W of at least 2 to pool, got",
    ),
    "small to pool": (
        lambda: ops.conv2d_relu(*zeros((1, 3, 3, 4), W), pool=True, padding="valid"),
        "x: expected H and W of at least 4 to pool, got",
    ),
    "small": (
        lambda: ops.conv2d_relu(*zeros((1, 3, 2, 4), W), padding="valid"),
        r"x: expected H and W of at least 3, got \(1, 3, 2, 4\)",
    ),
    "small skip": (
        lambda: ops.upsample_concat_conv2d_relu(*zeros((1, 2, 1, 4), (1, 1, 2, 8), W), padding="valid"),
        r"skip: expected H and W of at least 3, got \(1, 1, 2, 8\)",
    ),
    "stride": (lambda: ops.conv2d_relu(*zeros(X, W), stride=(0, 1)), r"stride: expected two positive .*got \(0, 1\)"),
    "strided pool": (
        lambda: ops.conv2d_relu(*zeros(X, W), stride=(2, 2), pool=True),
        r"stride: expected 1 and 1 to pool, got \(2, 2\)",
    ),
    "padding": (lambda: ops.conv2d_relu(*zeros(X, W), padding="full"), r"padding: expected one of .*, got 'full'"),
    "one value": (
        lambda: ops.batch_norm_relu(*zeros((1, 3, 1, 1))),
        r"x: expected more than one value for each channel, got \(1, 3, 1, 1\)",
    ),
    "one pixel": (
        lambda: ops.instance_norm_relu(*zeros((2, 3, 1, 1))),
        r"x: expected more than one value for each channel, got \(2, 3, 1, 1\)",
    ),
    "gamma": (lambda: ops.batch_norm_relu(*zeros(X, (2,))), r"weight: expected shape \(3,\), got \(2,\)"),
    "norm to pool": (
        lambda: ops.instance_norm_relu(*zeros((1, 3, 1, 4)), pool=True),
        "x: expected H and W of at least 2 to pool, got",
    ),
    "one statistic": (
        lambda: ops.batch_norm_relu(*zeros(X), running_mean=torch.zeros(3)),
        "running_var: expected None or a tensor as running_mean is, got None",
    ),
    "statistics": (
        lambda: ops.batch_norm_relu(*zeros(X), running_mean=torch.zeros(2), running_var=torch.ones(2)),
        r"running_mean: expected shape \(3,\), got \(2,\)",
    ),
    "mode": (
        lambda: ops.upsample_concat(*zeros(X, (1, 3, 8, 8)), mode="cubic"),
        "mode: expected one of .*, got 'cubic'",
    ),
    "no mode": (lambda: ops.upsample_concat(*zeros(X, X), mode="none"), "mode: expected one of .*, got 'none'"),
    "batch": (lambda: ops.upsample_concat(*zeros(X, (2, 3, 8, 8))), "skip: expected x's batch of 1, got"),
    "transpose": (
        lambda: ops.conv_transpose2x2(*zeros(X, (2, 3, 2, 2))),
        r"weight: expected shape \(3, O, R, S\), .*got",
    ),
    "head": (
        lambda: headed((2, 3, 1, 1)),
        r"head: expected shape \(K, 2, 1, 1\), K at least 1, got \(2, 3, 1, 1\)",
    ),
    "head's bias": (
        lambda: headed((3, 2, 1, 1), torch.zeros(2)),
        r"head_bias: expected shape \(3,\), got \(2,\)",
    ),
    "head's dtype": (
        lambda: headed((3, 2, 1, 1), dtype=torch.float16),
        "head: expected x's dtype torch.float32, got torch.float16",
    ),
    "empty transpose": (
        lambda: ops.conv_transpose2x2(*zeros(X, (3, 2, 0, 2))),
        r"weight: .*each at least 1, got \(3, 2, 0, 2\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_dispatch_says_why():
    cpu = torch.device("cpu")
    assert dispatch.choose(cpu, torch.float32).implementation == "torch"
    assert "float64" in (dispatch.why_not_triton(torch.device("cuda"), torch.float64) or "")
    with pytest.raises(RuntimeError, match="asked for, but float64"), dispatch.forced("triton"):
        dispatch.choose(cpu, torch.float64)
    with pytest.raises(ValueError, match="expected one of .*, got 'cudnn'"), dispatch.forced("cudnn"):
        pass
    assert dispatch.choose(cpu, torch.float32).reason != "asked for"  # the block has ended
