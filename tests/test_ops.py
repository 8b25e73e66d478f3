"""The fused operators as torch sees them: schema, fake kernels, gradients, autocast, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastunet import dispatch, ops, reference
from fastunet.ops import backward, commuted, steps, upsampling
from fastunet.parity import compare
from fastunet.parity.recording import Recorder, Replay
from fastunet.parity.rule import truncating_stages


def replicated(x, skip, weight, bias, mode):
    """The operator that repeats the upsampled map's border, by torch alone."""
    if mode == "bilinear":
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    rows, columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
    pad = [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
    x = F.pad(x, pad, mode="replicate")
    return F.relu(F.conv2d(torch.cat([x, skip], 1), weight, bias, padding=1))


# name -> (call on float inputs, the same with plain torch, input shapes)
CASES = {
    "conv2d_relu": (
        ops.conv2d_relu,
        lambda x, w, b: reference.conv2d_relu(x, w, b, 0.0),
        [(2, 3, 5, 6), (4, 3, 3, 3), (4,)],
    ),
    "conv2d_leaky_pool": (
        lambda x, w, b: ops.conv2d_relu(x, w, b, negative_slope=0.2, pool=True),
        lambda x, w, b: (y := reference.conv2d_relu(x, w, b, 0.2), F.max_pool2d(y, 2)),
        [(2, 3, 5, 6), (4, 3, 3, 3), (4,)],
    ),
    "conv1x1_linear": (
        lambda x, w: ops.conv2d_relu(x, w, relu=False),
        lambda x, w: reference.conv2d_relu(x, w, None, 1.0),
        [(2, 3, 1, 4), (1, 3, 1, 1)],
    ),
    "strided": (
        lambda x, w, b: ops.conv2d_relu(x, w, b, stride=(2, 1)),
        lambda x, w, b: F.relu(F.conv2d(x, w, b, stride=(2, 1), padding=1)),
        [(2, 3, 5, 6), (4, 3, 3, 3), (4,)],
    ),
    "unpadded": (
        lambda x, w, b: ops.conv2d_relu(x, w, b, negative_slope=0.1, padding="valid"),
        lambda x, w, b: F.leaky_relu(F.conv2d(x, w, b), 0.1),
        [(2, 3, 5, 6), (4, 3, 3, 3), (4,)],
    ),
    "unpadded_pool": (
        lambda x, w: ops.conv2d_relu(x, w, pool=True, padding="valid"),
        lambda x, w: (y := F.relu(F.conv2d(x, w)), F.max_pool2d(y, 2)),
        [(2, 3, 5, 7), (4, 3, 3, 3)],
    ),
    "max_pool2x2": (
        ops.max_pool2x2,
        lambda x: F.max_pool2d(x, 2),
        [(2, 3, 5, 6)],
    ),
    "batch_norm_relu": (
        lambda x, w, b: ops.batch_norm_relu(x, w, b, negative_slope=0.1)[0],
        lambda x, w, b: F.leaky_relu(F.batch_norm(x, None, None, w, b, True), 0.1),
        [(2, 3, 5, 6), (3,), (3,)],
    ),
    "batch_norm_pool": (
        lambda x: ops.batch_norm_relu(x, relu=False, pool=True)[:2],
        lambda x: (y := F.batch_norm(x, None, None, None, None, True), F.max_pool2d(y, 2)),
        [(2, 3, 5, 6)],
    ),
    "upsample_concat": (
        ops.upsample_concat,
        lambda x, s: reference.upsample_concat(x, s, "bilinear", True),
        [(2, 3, 2, 3), (2, 2, 5, 7)],
    ),
    "upsample_concat_cropped": (
        lambda x, s: ops.upsample_concat(x, s, mode="nearest"),
        lambda x, s: reference.upsample_concat(x, s, "nearest", True),
        [(1, 3, 3, 3), (1, 2, 5, 4)],
    ),
    "upsample_concat_conv2d_relu": (
        lambda x, s, w, b: ops.upsample_concat_conv2d_relu(x, s, w, b, align_corners=False),
        lambda x, s, w, b: reference.upsample_concat_conv2d_relu(x, s, w, b, "bilinear", False, 0.0),
        [(2, 3, 2, 3), (2, 2, 5, 6), (4, 5, 3, 3), (4,)],
    ),
    "replicated": (
        lambda x, s, w, b: ops.upsample_concat_conv2d_relu(x, s, w, b, match="replicate_pad"),
        lambda x, s, w, b: replicated(x, s, w, b, "bilinear"),
        [(2, 3, 2, 3), (2, 2, 6, 9), (4, 5, 3, 3), (4,)],
    ),
    "replicated_alone": (
        lambda x, s, w, b: ops.upsample_concat_conv2d_relu(x, s, w, b, mode="none", match="replicate_pad"),
        lambda x, s, w, b: replicated(x, s, w, b, "none"),
        [(2, 3, 4, 4), (2, 2, 3, 7), (4, 5, 3, 3), (4,)],  # cropped below, and repeated on both sides
    ),
    "no_skip": (
        lambda x, w, b: ops.upsample_concat_conv2d_relu(x, x.new_empty(2, 0, 5, 6), w, b, mode="nearest"),
        lambda x, w, b: reference.conv2d_relu(F.pad(F.interpolate(x, scale_factor=2.0), [0, 0, 0, 1]), w, b, 0.0),
        [(2, 3, 2, 3), (4, 3, 3, 3), (4,)],
    ),
    "unpadded_concat": (
        lambda x, s, w, b: ops.upsample_concat_conv2d_relu(x, s, w, b, padding="valid"),
        lambda x, s, w, b: F.relu(F.conv2d(reference.upsample_concat(x, s, "bilinear", True), w, b)),
        [(2, 3, 2, 3), (2, 2, 5, 6), (4, 5, 3, 3), (4,)],
    ),
    "concat_conv2d": (
        lambda x, s, w: ops.upsample_concat_conv2d_relu(x, s, w, mode="none", relu=False),
        lambda x, s, w: reference.upsample_concat_conv2d_relu(x, s, w, None, "none", False, 1.0),
        [(2, 3, 4, 6), (2, 2, 5, 6), (4, 5, 3, 3)],
    ),
    "conv_transpose2x2": (
        ops.conv_transpose2x2,
        reference.conv_transpose2x2,
        [(2, 3, 4, 3), (3, 5, 2, 2), (5,)],
    ),
    "conv_transpose_oblong": (
        ops.conv_transpose2x2,
        lambda x, w, b: F.conv_transpose2d(x, w, b, (1, 3)),
        [(2, 3, 4, 3), (3, 5, 1, 3), (5,)],
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def outputs(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_plain_torch_path(case, dtype, seed):
    op, plain, shapes = case
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    truth = outputs(plain(*(t.double() for t in inputs)))
    for got, baseline, true in zip(outputs(op(*inputs)), outputs(plain(*inputs)), truth, strict=True):
        parity = compare(got, baseline, true)
        assert parity.ok, str(parity)
        assert got.is_contiguous(memory_format=torch.channels_last)


class Names(TorchDispatchMode):
    """Which operators run within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


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


def test_kernel_path(case, seed, device):
    op, plain, shapes = case
    inputs = [torch.randn(shape, device=device) for shape in shapes]
    truth = outputs(plain(*(t.double().cpu() for t in inputs)))
    with dispatch.forced("triton"):
        result = outputs(op(*inputs))
    for got, baseline, true in zip(result, outputs(plain(*inputs)), truth, strict=True):
        parity = compare(got, baseline, true, tf32=got.is_cuda)
        assert parity.ok, str(parity)


@pytest.mark.parametrize("name", CASES)
def test_results_may_be_changed_in_place(name, seed):
    """As PyTorch's own may: by whoever calls, but not where they are kept for backward."""
    op, _, shapes = CASES[name]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    *_, y = outputs(op(*inputs))
    y.add_(1)
    kept = {"conv2d_relu", "upsample_concat_conv2d_relu", "replicated", "replicated_alone", "no_skip"}
    if name in kept | {"batch_norm_relu", "strided", "unpadded", "unpadded_concat"}:
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
    baseline = torch.autograd.grad(outputs(plain(*inputs)), inputs, cotangents)
    wide = [t.detach().double().cpu().requires_grad_() for t in inputs]
    truth = torch.autograd.grad(outputs(plain(*wide)), wide, [c.double().cpu() for c in cotangents])
    for a, b, base, true in zip(got, again, baseline, truth, strict=True):
        assert torch.equal(a, b)
        parity = compare(a, base, true, tf32=a.is_cuda, stages=2)
        assert parity.ok, str(parity)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_gradients_of_gradients_are_refused(case, implementation, seed, device):
    op, _, shapes = case
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    with dispatch.forced(implementation):
        result = outputs(op(*inputs))
    total = torch.stack([t.square().sum() for t in result]).sum()
    found = torch.autograd.grad(total, inputs, create_graph=True)  # the first ones are given all the same
    with pytest.raises(RuntimeError, match=r"fastunet\.ops\.\w+: gradients of gradients are not supported"):
        sum(g.square().sum() for g in found).backward()  # pyright: ignore[reportAttributeAccessIssue]


def test_steps_are_chosen_apart():
    cpu = torch.device("cpu")
    with dispatch.forced("triton"), dispatch.forced("torch", "wgrad"):
        chosen = [dispatch.choose(cpu, torch.float32, step).implementation for step in dispatch.STEPS]
    assert chosen == ["triton", "triton", "torch"]
    with (
        pytest.raises(ValueError, match="steps: expected some of .*, got 'backward'"),
        dispatch.forced("torch", "backward"),
    ):
        pass


@pytest.mark.parametrize("theirs", [("dgrad",), ("wgrad",), ("dgrad", "wgrad")], ids=str)
def test_a_layer_of_which_a_table_prefers_torch(case, theirs, monkeypatch, seed, device):
    """Steps of one layer by PyTorch, all else by our kernels: the same gradients."""
    op, plain, shapes = case
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    loss = lambda result: torch.stack([t.square().sum() for t in outputs(result)]).sum()
    expected = torch.autograd.grad(loss(plain(*inputs)), inputs)

    def choose(*layer: object) -> dispatch.Choice:
        *_, step, unserved = layer
        return dispatch.Choice("torch" if unserved or step in theirs else "triton", "measured")

    monkeypatch.setattr(backward, "choose", choose)
    with dispatch.forced("triton"):
        got = torch.autograd.grad(loss(op(*inputs)), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["replicated", "replicated_alone", "no_skip", "strided", "unpadded_concat", "conv_transpose_oblong"]
)
def test_gradients_in_16_bits(name, dtype, implementation, seed, device):
    """By the rule, each network's truth taking the sides of ReLUs that it took."""
    op, plain, shapes = CASES[name]
    inputs = [(torch.randn(shape, device=device) / max(1, len(shape) - 2)).to(dtype) for shape in shapes]
    cotangent = torch.randn_like(outputs(plain(*inputs))[0])

    def run(function, mode, wide=False):
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in inputs]
        with dispatch.forced(implementation), mode:
            y = outputs(function(*leaves))[0]
        return torch.autograd.grad(y, leaves, cotangent.to(y.dtype))

    ours, theirs = Recorder(), Recorder()
    got, baseline = run(op, ours), run(plain, theirs)
    exact, their_exact = (run(plain, Replay(sides.decisions), wide=True) for sides in (ours, theirs))
    stages = truncating_stages(4, dtype, implementation == "triton" and device == "cpu")
    for a, b, true, their_true in zip(got, baseline, exact, their_exact, strict=True):
        parity = compare(a, b, true, baseline_truth=their_true, stages=stages)
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


OPS = torch.ops.fastunet
SAME = (1, 1), "same"
OP_ARGUMENTS = {
    "conv2d_relu": lambda t: (OPS.conv2d_relu.default, (t(2, 3, 5, 6), t(4, 3, 3, 3), t(4), 0.1, *SAME)),
    "conv2d_relu no bias": lambda t: (OPS.conv2d_relu.default, (t(2, 3, 1, 1), t(1, 3, 1, 1), None, 1.0, *SAME)),
    "conv2d_relu strided": lambda t: (
        OPS.conv2d_relu.default,
        (t(2, 3, 5, 6), t(4, 3, 3, 3), t(4), 0.1, (2, 3), "same"),
    ),
    "conv2d_relu_pool": lambda t: (OPS.conv2d_relu_pool.default, (t(2, 3, 5, 2), t(4, 3, 3, 3), t(4), 0.0, *SAME)),
    "conv2d_relu_pool unpadded": lambda t: (
        OPS.conv2d_relu_pool.default,
        (t(2, 3, 5, 4), t(4, 3, 3, 3), t(4), 0.0, (1, 1), "valid"),
    ),
    "max_pool2x2": lambda t: (OPS.max_pool2x2.default, (t(2, 3, 5, 2),)),
    "batch_norm_relu": lambda t: (OPS.batch_norm_relu.default, (t(2, 3, 5, 4), t(3), t(3), 1e-5, 0.0, True)),
    "batch_norm_relu alone": lambda t: (OPS.batch_norm_relu.default, (t(2, 3, 5, 1), None, t(3), 1e-3, 1.0, False)),
    "upsample_concat": lambda t: (OPS.upsample_concat.default, (t(1, 3, 2, 3), t(1, 2, 5, 6), "bilinear", True)),
    "upsample_concat_conv2d_relu": lambda t: (
        OPS.upsample_concat_conv2d_relu.default,
        (t(1, 3, 2, 3), t(1, 2, 4, 7), t(4, 5, 3, 3), t(4), "nearest", False, 0.0, "zero_pad", "same"),
    ),
    "upsample_concat_conv2d_relu replicated": lambda t: (
        OPS.upsample_concat_conv2d_relu.default,
        (t(1, 3, 2, 3), t(1, 2, 5, 9), t(4, 5, 3, 3), t(4), "bilinear", True, 0.0, "replicate_pad", "same"),
    ),
    "upsample_concat_conv2d_relu no skip": lambda t: (
        OPS.upsample_concat_conv2d_relu.default,
        (t(1, 3, 2, 3), t(1, 0, 4, 7).detach(), t(4, 3, 3, 3), t(4), "nearest", False, 1.0, "zero_pad", "same"),
    ),
    "upsample_concat_conv2d_relu unpadded": lambda t: (
        OPS.upsample_concat_conv2d_relu.default,
        (t(1, 3, 2, 3), t(1, 2, 4, 6), t(4, 5, 3, 3), t(4), "bilinear", True, 0.1, "zero_pad", "valid"),
    ),
    "cudnn_backward": lambda t: (
        OPS.cudnn_backward.default,
        (
            *(shape.detach() for shape in (t(2, 4, 3, 6), t(2, 3, 5, 6), t(4, 3, 3, 3))),
            *([True, True, False], [2, 1], 1, False),
        ),
    ),
    "conv_transpose2x2": lambda t: (OPS.conv_transpose2x2.default, (t(2, 3, 4, 3), t(3, 1, 2, 2), t(1))),
    "conv_transpose2x2 oblong": lambda t: (OPS.conv_transpose2x2.default, (t(2, 3, 4, 3), t(3, 1, 1, 3), None)),
}


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("name", OP_ARGUMENTS)
def test_opcheck(name, implementation, seed, device):
    op, arguments = OP_ARGUMENTS[name](lambda *shape: torch.randn(shape, device=device, requires_grad=True))
    with dispatch.forced(implementation):
        torch.library.opcheck(op, arguments)


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


def zeros(*shapes, **options):
    return tuple(torch.zeros(shape, **options) for shape in shapes)


X, W = (1, 3, 4, 4), (2, 3, 3, 3)
BAD = {
    "rank": (lambda: ops.conv2d_relu(*zeros((3, 4, 4), W)), r"x: expected shape \(N, C, H, W\), .*got \(3, 4, 4\)"),
    "no channel": (lambda: ops.conv2d_relu(*zeros((1, 0, 4, 4), (2, 0, 3, 3))), r"C at least 1, got \(1, 0, 4, 4\)"),
    "empty source": (lambda: ops.upsample_concat(*zeros((1, 0, 4, 4), X)), r"x: .*C at least 1, got \(1, 0, 4, 4\)"),
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
    "bias": (lambda: ops.conv2d_relu(*zeros(X, W, (3,))), r"bias: expected shape \(2,\), got \(3,\)"),
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
    "gamma": (lambda: ops.batch_norm_relu(*zeros(X, (2,))), r"weight: expected shape \(3,\), got \(2,\)"),
    "max-pool": (lambda: ops.max_pool2x2(*zeros((1, 3, 1, 4))), "x: expected .*H and W of at least 2, got"),
    "mode": (
        lambda: ops.upsample_concat(*zeros(X, (1, 3, 8, 8)), mode="cubic"),
        "mode: expected one of .*, got 'cubic'",
    ),
    "no mode": (lambda: ops.upsample_concat(*zeros(X, X), mode="none"), "mode: expected one of .*, got 'none'"),
    "batch": (lambda: ops.upsample_concat(*zeros(X, (2, 3, 8, 8))), "skip: expected x's batch of 1, got"),
    "transpose": (
        lambda: ops.conv_transpose2x2(*zeros(X, (2, 3, 2, 2))),
        r"weight: expected shape \(3, O, 2, 2\), got",
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
