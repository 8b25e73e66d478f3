"""The operators' gradients: values, refusals, which step runs on what."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor, FakeTensorMode

from fastunet import dispatch, ops, reference
from fastunet.ops import backward, steps, upsampling
from fastunet.parity import compare
from fastunet.parity.recording import Recorder, Replay

from .cases import CASES, Names, outputs

OPS = torch.ops.fastunet


def test_gradients_against_finite_differences(case, seed):
    op, _, shapes = case
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(op, inputs)


def test_gradients_are_the_references(case, seed):
    op, plain, shapes = case
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    want = outputs(plain(*inputs))
    weights = [torch.randn_like(t) for t in want]
    expected = torch.autograd.grad(want, inputs, weights)
    got = torch.autograd.grad(outputs(op(*inputs)), inputs, weights)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("forced", [("triton",), ("triton", "dgrad"), ("triton", "wgrad")], ids="-".join)
def test_gradients_through_the_kernels(case, forced, seed, device):
    """By the rule, and the same bits again; with one step alone ours, the other is PyTorch's."""
    op, plain, shapes = case
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    with dispatch.forced(*forced):
        result = outputs(op(*inputs))
    cotangents = [torch.randn_like(t) for t in result]
    got, again = (torch.autograd.grad(result, inputs, cotangents, retain_graph=True) for _ in range(2))
    for a, b in zip(got, again, strict=True):
        assert torch.equal(a, b)
    hold_by_the_rule(got, plain, inputs, cotangents)


def hold_by_the_rule(got, plain, inputs, cotangents):
    baseline = torch.autograd.grad(outputs(plain(*inputs)), inputs, cotangents)
    wide = [t.detach().double().cpu().requires_grad_() for t in inputs]
    truth = torch.autograd.grad(outputs(plain(*wide)), wide, [c.double().cpu() for c in cotangents])
    summed = sum(c.double().square().sum((0, 2, 3)).max().item() for c in cotangents) ** 0.5
    for a, base, true in zip(got, baseline, truth, strict=True):
        # Those of channels are sums over pixels, of terms as large as this, which now and then cancel in all three.
        parity = compare(a, base, true, tf32=a.is_cuda, stages=2, terms=summed if a.dim() == 1 else 0.0)
        assert parity.ok, str(parity)


WAYS = {
    "backward": lambda loss, inputs: loss.backward(),
    "backward of inputs": lambda loss, inputs: loss.backward(inputs=inputs),
    "grad": lambda loss, inputs: torch.autograd.grad(loss, inputs),
    "grad of some": lambda loss, inputs: torch.autograd.grad(loss, inputs[:1], allow_unused=True),
}


@pytest.mark.parametrize(
    "implementation, way", [*(("torch", way) for way in WAYS), ("triton", "backward"), ("triton", "grad of some")]
)
def test_gradients_of_gradients_are_refused(case, implementation, way, seed, device):
    """A penalty on them is not left out of a loss without a word."""
    op, _, shapes = case
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    with dispatch.forced(implementation):
        result = outputs(op(*inputs))
    total = torch.stack([t.square().sum() for t in result]).sum()
    found = torch.autograd.grad(total, inputs, create_graph=True)  # the first ones are given all the same
    penalty = torch.stack([g.square().sum() for g in found]).sum()
    with pytest.raises(RuntimeError, match=r"fastunet\.ops\.\w+: gradients of gradients are not supported") as refused:
        WAYS[way](total + penalty, inputs)
    assert str(refused.value).partition(":")[0].removeprefix("fastunet.ops.") in ops.__all__


def test_steps_are_chosen_apart(device):
    with dispatch.forced("triton"), dispatch.forced("torch", "wgrad"):
        chosen = [dispatch.choose(torch.device(device), torch.float32, step).implementation for step in dispatch.STEPS]
    assert chosen == ["triton", "triton", "torch"]
    with (
        pytest.raises(ValueError, match="steps: expected some of .*, got 'backward'"),
        dispatch.forced("torch", "backward"),
    ):
        pass


@pytest.mark.parametrize("theirs", [("dgrad",), ("wgrad",), ("dgrad", "wgrad")], ids=str)
def test_a_layer_of_which_a_table_prefers_torch(case, theirs, monkeypatch, seed, device):
    """Steps of one layer by PyTorch, all else by our kernels: by the rule."""
    op, plain, shapes = case
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]

    def chosen(*layer: object) -> dispatch.Choice:
        *_, step, _ = layer
        return dispatch.Choice("torch" if step in theirs else "triton", "measured")

    monkeypatch.setattr(backward, "chosen", chosen)
    with dispatch.forced("triton"):
        result = outputs(op(*inputs))
        cotangents = [torch.randn_like(t) for t in result]
        got = torch.autograd.grad(result, inputs, cotangents)
    hold_by_the_rule(got, plain, inputs, cotangents)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["replicated", "replicated_alone", "no_skip", "strided", "unpadded_concat", "conv_transpose_oblong"]
)
def test_gradients_in_16_bits(name, dtype, implementation, seed, device):
    op, plain, shapes = CASES[name]
    inputs = [(torch.randn(shape, device=device) / max(1, len(shape) - 2)).to(dtype) for shape in shapes]
    hold_in_16_bits(op, plain, inputs, implementation)


def hold_in_16_bits(op, plain, inputs, implementation, **steps):
    """By the rule, each network's truth taking the sides of ReLUs that it took. ``steps``: served by others."""
    cotangent = torch.randn_like(outputs(plain(*inputs))[0])

    def run(function, mode, wide=False):
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in inputs]
        with contextlib.ExitStack() as stack:
            stack.enter_context(dispatch.forced(implementation))
            for step, other in steps.items():
                stack.enter_context(dispatch.forced(other, step))
            stack.enter_context(mode)
            y = outputs(function(*leaves))[0]
        return torch.autograd.grad(y, leaves, cotangent.to(y.dtype))

    ours, theirs = Recorder(), Recorder()
    got, baseline = run(op, ours), run(plain, theirs)
    exact, their_exact = (run(plain, Replay(sides.decisions), wide=True) for sides in (ours, theirs))
    for a, b, true, their_true in zip(got, baseline, exact, their_exact, strict=True):
        parity = compare(a, b, true, baseline_truth=their_true, stages=4)
        assert parity.ok, str(parity)


@pytest.mark.parametrize("wanted", range(4))
def test_gradient_of_one_input_alone(wanted, seed):
    op, plain, shapes = CASES["upsample_concat_conv2d_relu"]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=i == wanted) for i, shape in enumerate(shapes)]
    expected = torch.autograd.grad(plain(*inputs).square().sum(), inputs[wanted])
    torch.testing.assert_close(torch.autograd.grad(op(*inputs).square().sum(), inputs[wanted]), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_nan_and_inf_in_gradients(value, seed):
    """A dead ReLU stops NaN and infinity, as torch's does; a GradScaler depends on the rest."""
    x, w = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3)
    grads = []
    for f in (lambda x: ops.conv2d_relu(x, w), lambda x: reference.conv2d_relu(x, w, None, 0.0)):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        grads.append(torch.autograd.grad(y, leaf, torch.where(y > 0, 1.0, value))[0])
    torch.testing.assert_close(*grads)
    assert grads[0].isfinite().all()


@pytest.mark.parametrize("corners", [False, True])
def test_bilinear_gradient_as_matrix_products(corners, seed):
    """What CUDA takes instead of torch's own, whose atomics add in another order each time."""
    grad = torch.randn(2, 3, 8, 10, dtype=torch.float64)
    want = torch.ops.aten.upsample_bilinear2d_backward(grad, [8, 10], [2, 3, 4, 5], corners, 2.0, 2.0)
    torch.testing.assert_close(upsampling.bilinear_backward(grad, corners), want)


GEOMETRIES = {  # transposed, stride, padding, and the size of what comes of 4 x 5 pixels
    "same": (False, [1, 1], 1, (4, 5)),
    "strided": (False, [2, 1], 1, (2, 5)),
    "unpadded": (False, [1, 1], 0, (2, 3)),
    "transposed": (True, [2, 2], 0, (8, 10)),
    "transposed oblong": (True, [1, 3], 0, (4, 15)),
}


@pytest.mark.parametrize("transposed, stride, padding, size", GEOMETRIES.values(), ids=GEOMETRIES)
def test_gradients_by_cudnn_are_asked_to_repeat_in_compiled_code_too(
    transposed, stride, padding, size, monkeypatch, seed
):
    seen = []
    right = torch.ops.aten.convolution_backward

    class Aten:
        def convolution_backward(self, *arguments):
            seen.append(torch.backends.cudnn.deterministic)
            return right(*arguments)

    monkeypatch.setattr(steps, "aten", Aten())
    x, weight = torch.randn(2, 3, 4, 5), torch.randn((3, 6, *stride) if transposed else (6, 3, 3, 3))
    grad = torch.randn(2, 6, *size)
    conv = F.conv_transpose2d if transposed else F.conv2d
    leaves = [t.clone().requires_grad_() for t in (x, weight, torch.zeros(6))]
    y = conv(*leaves, stride=stride, padding=padding)
    want = torch.autograd.grad(y, leaves, grad)
    given = grad, x, weight
    ours = torch.compile(lambda m: OPS.cudnn_backward(*given, m, stride, padding, transposed), backend="aot_eager")
    for mask in ([True, True, True], [False, True, False]):
        for got, expected, wanted in zip(ours(mask), want, mask, strict=True):
            assert got.numel() == 0 if not wanted else torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert seen and all(seen) and not torch.backends.cudnn.deterministic


def test_on_cuda_gradients_by_pytorch_are_those_asked_to_repeat(seed):
    """As far as a mode that computes shapes alone can tell, on a machine without one."""
    with FakeTensorMode() as mode:
        shapes = (1, 6, 9, 10), (1, 2, 9, 10), (6, 2, 3, 3)
        grad, x, weight = (FakeTensor(mode, torch.empty(s, device="meta"), torch.device("cuda:0")) for s in shapes)
        with Names() as names:
            found = steps.convolution_backward(grad, x, weight, (True, False, True))
    assert [None if g is None else tuple(g.shape) for g in found] == [(1, 2, 9, 10), None, (6,)]
    assert "fastunet::cudnn_backward" in names.seen and "aten::convolution_backward" not in names.seen
