"""A FastUNet in training, as people train: what a drop-in module must go along with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from fastunet import FastUNet, dispatch
from fastunet.model import _normed
from fastunet.parity.recording import Recorder
from fastunet.reference import UNet
from fastunet.trace import trace

from .test_model import KINDS, assert_close, pair


@pytest.fixture(autouse=True)
def through_the_operators() -> Iterator[None]:
    """A CPU, where these networks are, trains with the reference itself, unless the operators are asked for."""
    with dispatch.forced("torch"):
        yield


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    for name, expected in gradients(theirs).items():
        got = gradients(ours)[name]
        assert (got is None) == (expected is None), name
        if expected is not None:
            assert_close(got, expected)


def small_pair(**config) -> tuple[UNet, FastUNet]:
    """For the interpreter, which takes its time."""
    reference, fast = UNet(1, 2, (2, 3), **config), FastUNet(1, 2, (2, 3), **config)
    fast.load_state_dict(reference.state_dict())
    return reference, fast


@pytest.fixture
def double_pair(seed: int) -> tuple[UNet, FastUNet]:
    reference, fast = pair()
    return reference.double(), fast.double()


@pytest.fixture
def x(seed: int) -> Tensor:
    return torch.randn(2, 2, 13, 10, dtype=torch.float64)


def test_gradients_accumulate(double_pair, x):
    for model in double_pair:
        for part in x.split(1):
            loss_of(model, part).backward()
    assert_same_gradients(double_pair[1], double_pair[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(use_reentrant, double_pair, x):
    _, fast = double_pair
    loss_of(fast, x).backward()
    expected = {name: g.clone() for name, g in gradients(fast).items() if g is not None}
    fast.zero_grad()
    leaf = x.clone().requires_grad_()  # a reentrant checkpoint wants one
    checkpoint(loss_of, fast, leaf, use_reentrant=use_reentrant).backward()  # pyright: ignore
    for name, g in gradients(fast).items():
        assert g is not None and torch.equal(g, expected[name]), name


def test_accumulated_checkpointed_and_channels_last_through_the_kernels(seed, device):
    reference, fast = (model.to(device) for model in small_pair())
    fast.to(memory_format=torch.channels_last)  # pyright: ignore
    x = torch.randn(2, 1, 5, 6, device=device)
    for part in x.split(1):
        loss_of(reference, part).backward()
    with dispatch.forced("triton"):
        loss_of(fast, x[:1]).backward()
        part = x[1:].contiguous(memory_format=torch.channels_last)
        checkpoint(loss_of, fast, part, use_reentrant=False).backward()  # pyright: ignore
    for (name, p), expected in zip(fast.named_parameters(), reference.parameters(), strict=True):
        assert p.grad is not None and expected.grad is not None, name
        assert_close(p.grad, expected.grad, 1e-4)


FROZEN: dict[str, Callable[[str], bool]] = {
    "nothing": lambda name: False,
    "everything": lambda name: True,
    "encoder": lambda name: name.startswith("downs"),
    "decoder": lambda name: name.startswith("ups"),
    "weights": lambda name: name.endswith("weight"),
    "biases": lambda name: name.endswith("bias"),
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters_and_the_input(frozen, double_pair, x):
    found = []
    for model in double_pair:
        for name, p in model.named_parameters():
            p.requires_grad_(not FROZEN[frozen](name))
        leaf = x.clone().requires_grad_(frozen != "nothing")
        loss_of(model, leaf).backward()
        found.append(leaf.grad)
    assert_same_gradients(double_pair[1], double_pair[0])
    if frozen == "everything":
        assert all(g is None for g in gradients(double_pair[1]).values())
    if frozen != "nothing":
        assert_close(found[1], found[0])


@pytest.mark.parametrize("frozen", ["nothing", "everything", "weights"])
def test_frozen_parameters_and_the_input_through_the_kernels(frozen, seed, device):
    x = torch.randn(1, 1, 5, 6, device=device)
    found, pairs = [], [model.to(device) for model in small_pair()]
    for model, implementation in zip(pairs, ("torch", "triton"), strict=True):
        for name, p in model.named_parameters():
            p.requires_grad_(not FROZEN[frozen](name))
        leaf = x.clone().requires_grad_(frozen != "nothing")
        with dispatch.forced(implementation):
            loss_of(model, leaf).backward()
        found.append(leaf.grad)
    for (name, p), expected in zip(pairs[1].named_parameters(), pairs[0].parameters(), strict=True):
        assert (p.grad is None) == (expected.grad is None) == FROZEN[frozen](name), name
        if p.grad is not None:
            assert_close(p.grad, expected.grad, 1e-4)
    assert (found[1] is None) == (frozen == "nothing")
    if found[1] is not None:
        assert_close(found[1], found[0], 1e-4)


def test_channels_last_parameters(double_pair, x):
    reference, fast = double_pair
    fast.to(memory_format=torch.channels_last)  # pyright: ignore
    loss_of(reference, x).backward()
    loss_of(fast, x.contiguous(memory_format=torch.channels_last)).backward()
    assert_same_gradients(fast, reference)


def steps(model: nn.Module, x: Tensor, scaler: torch.amp.GradScaler, broken: float, dtype: torch.dtype) -> list:
    """Three steps, a number of the second's loss broken: scale and parameters after each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen = []
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype):
            loss = model(x).mul(broken).mean() if step == 1 else loss_of(model, x)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append((scaler.get_scale(), nn.utils.parameters_to_vector(model.parameters()).detach()))
    return seen


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1.0], ids=["nan", "inf", "finite"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_grad_scaler_skips_the_steps_that_eager_skips(dtype, broken, seed):
    x = torch.randn(2, 2, 12, 12)
    ours, theirs = (
        steps(model, x, torch.amp.GradScaler("cpu", init_scale=256.0), broken, dtype) for model in reversed(pair())
    )
    assert [scale for scale, _ in ours] == [scale for scale, _ in theirs]
    for i in range(3):
        torch.testing.assert_close(ours[i][1], theirs[i][1], rtol=1e-2, atol=1e-3)
    skipped = torch.equal(ours[0][1], ours[1][1])
    assert skipped == (broken != 1.0) == torch.equal(theirs[0][1], theirs[1][1])
    assert not torch.equal(ours[1][1], ours[2][1])


@pytest.mark.parametrize("broken", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_grad_scaler_skips_them_through_the_kernels(broken, seed, device):
    x = torch.randn(2, 1, 6, 4, device=device)
    reference, fast = (model.to(device) for model in small_pair())
    theirs = steps(reference, x, torch.amp.GradScaler(device, init_scale=256.0), broken, torch.float16)
    with dispatch.forced("triton"):
        ours = steps(fast, x, torch.amp.GradScaler(device, init_scale=256.0), broken, torch.float16)
    assert [scale for scale, _ in ours] == [scale for scale, _ in theirs] == [256.0, 128.0, 128.0]
    for i in range(3):
        torch.testing.assert_close(ours[i][1], theirs[i][1], rtol=1e-2, atol=1e-3)
    assert torch.equal(ours[0][1], ours[1][1])
    assert not torch.equal(ours[1][1], ours[2][1])


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_running_statistics_are_eagers(implementation, seed, device):
    reference, fast = (model.to(device) for model in small_pair(norm="batch"))
    if implementation == "torch":
        reference.double()
        fast.double()
    dtype, tolerance = (torch.float64, 1e-12) if implementation == "torch" else (torch.float32, 1e-4)
    for _ in range(2):
        x = torch.randn(2, 1, 6, 4, dtype=dtype, device=device)
        for model in (reference, fast):
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
            with dispatch.forced(implementation if model is fast else "torch"):
                loss_of(model, x).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), theirs in zip(fast.named_buffers(), reference.buffers(), strict=True):
        if ours.is_floating_point():
            assert_close(ours, theirs, tolerance)
        else:
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("training, tolerance", [(True, 5e-5), (False, 2e-6)], ids=["train", "eval"])
def test_gradients_of_a_norm_are_exact(training, tolerance, seed):
    """A CPU's sums over channels_last maps, one pixel after the other, are not: 2e-4 and 5e-6 off."""
    norm = nn.BatchNorm2d(8).train(training)
    x, cotangent = (1 + torch.randn(1, 8, 256, 256).contiguous(memory_format=torch.channels_last) for _ in range(2))
    found = torch.autograd.grad(_normed(norm, x, relu=False)[0], list(norm.parameters()), cotangent)
    norm.double()
    exact = torch.autograd.grad(norm(x.double()), list(norm.parameters()), cotangent.double())
    for got, expected in zip(found, exact, strict=True):
        assert_close(got, expected, tolerance)


def with_counter_lost(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.num_batches_tracked = None
    return norm


NORMS = {
    "as usual": lambda: nn.BatchNorm2d(3),
    "cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "cumulative, counter lost": lambda: with_counter_lost(nn.BatchNorm2d(3, momentum=None)),
    "statistics left alone": lambda: nn.BatchNorm2d(3).train(),
    "none": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "no parameters": lambda: nn.BatchNorm2d(3, affine=False),
}


@pytest.mark.parametrize("shape, scale", [((2, 3, 8, 9), 300.0), ((0, 3, 8, 9), 1.0)], ids=["large", "empty"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("name", NORMS)
def test_buffers_of_a_norm_follow_as_pytorchs(name, implementation, dtype, shape, scale, seed, device):
    """In float16 too, where a batch's variance is out of range and the running one is not."""
    ours, theirs = (NORMS[name]().to(device, dtype) for _ in range(2))
    for norm in (ours, theirs):
        norm.track_running_stats = name != "statistics left alone" and norm.track_running_stats
    for _ in range(2):
        x = scale * torch.randn(shape, device=device, dtype=dtype)
        with dispatch.forced(implementation):
            y, _ = _normed(ours, x, relu=False)
        torch.testing.assert_close(y, theirs(x), rtol=4e-3, atol=4e-3, check_stride=False)
    found, expected = dict(ours.named_buffers()), dict(theirs.named_buffers())
    assert found.keys() == expected.keys()
    for key, buffer in found.items():
        torch.testing.assert_close(buffer, expected[key], rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_an_empty_batch_goes_back_through_norms(implementation, norm, device):
    net = FastUNet(1, 2, (4, 6), norm=norm).to(device)
    with dispatch.forced(implementation):
        net(torch.randn(0, 1, 8, 8, device=device)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("order", ["conv_norm_act", "conv_act_norm"])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_norms_between_operators_that_were_asked_for(norm, order, x):
    reference, fast = (model.double() for model in pair(norm=norm, order=order))
    x = x.clone().requires_grad_()
    with Recorder() as recorder:
        ours = loss_of(fast, x)
    assert len(recorder.steps) == len(trace(fast.config, *x.shape[-2:]))
    (input_gradient,) = torch.autograd.grad(ours, x, retain_graph=True)
    ours.backward()
    expected = x.detach().requires_grad_()
    loss_of(reference, expected).backward()
    assert_same_gradients(fast, reference)
    assert_close(input_gradient, expected.grad)


def test_an_exponential_average_follows(double_pair, x):
    """A copy's prepared weights are those of now, after every update of the average."""
    averages = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for model in double_pair]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in double_pair]
    for _ in range(3):
        for model, average, optimizer in zip(double_pair, averages, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
            average.update_parameters(model)
        with torch.no_grad():
            expected, got = (average.eval()(x) for average in averages)
        assert_close(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_training_steps_through_the_kernels_repeat_to_the_bit(kind, seed, device):
    _, fast = small_pair(upsample=kind)
    x = torch.randn(2, 1, 5, 6, device=device)
    runs = []
    for _ in range(2):
        model = copy.deepcopy(fast).to(device)
        with dispatch.forced("triton"):
            loss_of(model, x).backward()
        runs.append(gradients(model))
    for name, g in runs[0].items():
        assert g is not None and torch.equal(g, runs[1][name]), name  # pyright: ignore


@pytest.mark.parametrize("norm", [None, "batch", "instance"])
def test_compiled_step_through_the_kernels(norm, seed, device):
    fast = small_pair(norm=norm)[1].to(device)
    compiled = copy.deepcopy(fast)
    x = torch.randn(2, 1, 5, 6, device=device)
    with dispatch.forced("triton"):
        loss_of(fast, x).backward()
        torch.compile(loss_of, backend="aot_eager", fullgraph=True)(compiled, x).backward()
    for (name, g), expected in zip(gradients(compiled).items(), gradients(fast).values(), strict=True):
        assert g is not None and torch.equal(g, expected), name  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(a, b) for a, b in zip(compiled.buffers(), fast.buffers(), strict=True))


@pytest.mark.parametrize(
    "order, how, batch",
    [
        ("conv_norm_act", "asked for", 2),
        *(("conv_act_norm", how, 1) for how in ("asked for", "compiled")),
    ],
)
def test_gradients_through_instance_norms(order, how, batch, seed):
    plain, fast = (network.double() for network in small_pair(norm="instance", order=order))
    x = torch.randn(batch, 1, 12, 11, dtype=torch.float64)
    step = torch.compile(loss_of, backend="aot_eager", fullgraph=True) if how == "compiled" else loss_of
    step(fast, x).backward()
    loss_of(plain, x).backward()
    for (name, g), expected in zip(gradients(fast).items(), gradients(plain).values(), strict=True):
        assert g is not None and torch.allclose(g, expected, rtol=1e-9, atol=1e-9), name  # pyright: ignore


@pytest.mark.cuda
@pytest.mark.parametrize("norm", [None, "batch"])
def test_steps_in_graphs_that_pytorch_captures(norm, seed):
    model = FastUNet(1, 2, (16, 32), norm=norm).cuda().bfloat16()
    plain = copy.deepcopy(model)
    x = torch.randn(2, 1, 40, 48, device="cuda", dtype=torch.bfloat16)
    graphed: Any = torch.cuda.make_graphed_callables(model, (x,))
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, plain)]
    for _ in range(4):
        x = torch.randn_like(x)
        losses = [loss_of(m, x) for m in (graphed, plain)]
        assert torch.equal(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for (name, p), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, expected), name


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("match", ["zero_pad", "replicate_pad"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_by_pytorchs_operators_repeat_too(dtype, match, compiled, seed):
    """Bilinear, padded by replication, and by cuDNN: of which PyTorch's own would not."""
    fast = FastUNet(1, 2, (16, 32, 64), upsample="bilinear", match=match).cuda().to(dtype)
    x = torch.randn(4, 1, 101, 75, device="cuda", dtype=dtype)
    step = torch.compile(loss_of, fullgraph=True) if compiled else loss_of
    runs = []
    for _ in range(5):
        model = copy.deepcopy(fast)
        with dispatch.forced("torch"):
            step(model, x).backward()
        runs.append(gradients(model))
    for name, g in runs[0].items():
        assert g is not None and all(torch.equal(g, run[name]) for run in runs[1:]), name  # pyright: ignore
