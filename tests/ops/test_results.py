"""What the operators give, on what and in which dtype."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastunet import dispatch, ops, reference
from fastunet.ops import commuted
from fastunet.parity import compare

from .cases import CASES, Names, outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_plain_torch_path(case, stages, dtype, seed):
    op, plain, shapes = case
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    truth = outputs(plain(*(t.double() for t in inputs)))
    for got, baseline, true in zip(outputs(op(*inputs)), outputs(plain(*inputs)), truth, strict=True):
        parity = compare(got, baseline, true, stages=stages)
        assert parity.ok, str(parity)
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_plain_torch_path_in_float64(case, seed):
    """A dtype of which no truth is nearer than the baseline; only the order of sums may differ."""
    op, plain, shapes = case
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for got, baseline in zip(outputs(op(*inputs)), outputs(plain(*inputs)), strict=True):
        torch.testing.assert_close(got, baseline, rtol=0, atol=1e-13)
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_without_gradients_a_cpu_takes_the_short_way(case, seed):
    op, _, shapes = case
    inputs = [torch.randn(shape) for shape in shapes]
    with torch.no_grad():
        with Names() as short:
            ours = outputs(op(*inputs))
        with ops.watched(), Names() as long:
            registered = outputs(op(*inputs))
    assert not any(name.startswith("fastunet::") for name in short.seen)
    assert any(name.startswith("fastunet::") for name in long.seen)
    for a, b in zip(ours, registered, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_kernel_path(case, stages, seed, device):
    op, plain, shapes = case
    inputs = [torch.randn(shape, device=device) for shape in shapes]
    truth = outputs(plain(*(t.double().cpu() for t in inputs)))
    with dispatch.forced("triton"):
        result = outputs(op(*inputs))
    for got, baseline, true in zip(result, outputs(plain(*inputs)), truth, strict=True):
        parity = compare(got, baseline, true, tf32=got.is_cuda, stages=stages)
        assert parity.ok, str(parity)


@pytest.mark.parametrize("name", CASES)
def test_results_may_be_changed_in_place(name, seed):
    """As PyTorch's own may: by whoever calls, but not where they are kept for backward."""
    op, _, shapes = CASES[name]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    *_, y = outputs(op(*inputs))
    y.add_(1)
    kept = {"conv2d_relu", "upsample_concat_conv2d_relu", "replicated", "replicated_alone", "no_skip"}
    if name in kept | {"batch_norm_relu", "instance_norm_relu", "strided", "unpadded", "unpadded_concat"}:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        y.sum().backward()
        assert all(t.grad is not None for t in inputs)


@torch.no_grad()
def test_whatever_the_default_device_is(seed):
    """And under a mode that computes shapes alone, of the wide level that a CPU upsamples behind its products."""
    shapes = (1, 128, 3, 5), (1, 2, 7, 10), (4, 130, 3, 3)
    x, skip, weight = (torch.randn(shape) for shape in shapes)
    expected = reference.upsample_concat_conv2d_relu(x, skip, weight, None, "bilinear", True, 0.0)
    commuted._blocks.cache_clear()
    with torch.device("meta"):
        got = ops.upsample_concat_conv2d_relu(x, skip, weight)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with FakeTensorMode():
        fake = ops.upsample_concat_conv2d_relu(*(torch.empty(shape) for shape in shapes))
    assert (fake.shape, fake.stride()) == (got.shape, got.stride())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_convolutions_in_its_dtype(dtype, seed):
    x, w, b = torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4)
    with torch.autocast("cpu", dtype):
        y, plain = ops.conv2d_relu(x, w, b), torch.conv2d(x, w, b, padding=1)
        assert y.dtype == plain.dtype == dtype
        assert ops.conv_transpose2x2(x, torch.randn(3, 2, 2, 2)).dtype == dtype
        skip = torch.randn(1, 1, 12, 12)
        assert ops.upsample_concat_conv2d_relu(x, skip, torch.randn(2, 4, 3, 3)).dtype == dtype
        # A pass over memory keeps what it is given, the widest of it: as torch.cat does.
        assert ops.upsample_concat(x, skip).dtype == torch.float32
        assert ops.upsample_concat(x.to(dtype), skip).dtype == torch.cat([x[:, :1].to(dtype), x[:, :1]]).dtype
        assert ops.conv2d_relu(x.double(), w.double()).dtype == torch.float64
    y.float().sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32


@pytest.mark.cuda
def test_launches_on_the_current_stream():
    x, w = torch.randn(1, 64, 64, 64, device="cuda").half(), torch.randn(64, 64, 3, 3, device="cuda").half() / 24
    expected = ops.conv2d_relu(x, w)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = x * 1
        y = ops.conv2d_relu(late, w)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.cuda
def test_launches_on_the_tensors_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x, w = torch.randn(1, 64, 16, 16, device="cuda:1").half(), torch.randn(64, 64, 3, 3, device="cuda:1").half() / 24
    with torch.cuda.device(0):
        y = ops.conv2d_relu(x, w)
    with torch.cuda.device(1):
        assert torch.equal(y, ops.conv2d_relu(x, w))


@pytest.mark.cuda
@pytest.mark.parametrize("allow", [True, False])
def test_float32_honours_allow_tf32(allow, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allow)
    x, w = torch.randn(1, 64, 32, 32, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda") / 24
    truth = reference.conv2d_relu(x.double(), w.double(), None, 0.0)
    error = ((ops.conv2d_relu(x, w) - truth).norm() / truth.norm()).item()
    assert (1e-5 < error < 1e-3) if allow else error < 1e-6
