"""Operators and their gradients by plans: the same bits as without, and none where a plan would not say the same."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from fastunet import FastUNet, dispatch, kernels, ops
from fastunet.ops import operator, plan, planned
from fastunet.ops.common import repeatable_cudnn
from fastunet.ops.plan import Plan
from fastunet.ops.planned import Instead, kind

from .cases import outputs

pytestmark = pytest.mark.usefixtures("poisoned")

NETWORKS: list[dict[str, Any]] = [
    {},
    {"norm": "batch", "activation": "leaky_relu"},
    {"norm": "batch", "order": "conv_act_norm", "downsample": "stride"},
    {"norm": "instance", "upsample": "transpose"},
    {"upsample": "nearest_conv", "match": "replicate_pad"},
]


@contextlib.contextmanager
def without_plans() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "_on_gpu", lambda x: False)
        yield


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's maps are taken for a GPU's."""
    monkeypatch.setattr(operator, "_on_gpu", lambda x: True)


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """Plans, of this test alone."""
    plans: dict[Any, Any] = {}
    monkeypatch.setattr(operator, "_kept", plans)
    return plans


def found(kept: dict[Any, Any]) -> list[Plan | Instead]:
    """What is kept: plans, and what is there in their place."""
    return [made for each in kept.values() for made in each._now[1]._made.values()]


def made(kept: dict[Any, Any]) -> int:
    return sum(isinstance(entry, Plan) for entry in found(kept))


def assert_same(got: Any, expected: Any) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_every_operator(case, request, implementation, seed, device, kept):
    """Of other values each time, with gradients of some of its inputs."""
    call, _, shapes = case
    wanted = [(seed >> i) % 2 == 0 for i in range(len(shapes))]
    has_gradients = "head" not in request.node.callspec.params["case"]

    def run(inputs: list[Tensor], gradients: list[Tensor]) -> tuple[Any, Any]:
        results = outputs(call(*inputs))
        leaves = [t for t in inputs if t.requires_grad]
        if not leaves:
            return results, ()
        through = [(y, g) for y, g in zip(results, gradients, strict=True) if y.requires_grad]
        ys, with_respect_to = zip(*through, strict=True)
        return results, torch.autograd.grad(ys, leaves, with_respect_to)

    with dispatch.forced(implementation):
        for _ in range(4):
            inputs = [torch.randn(shape, device=device) for shape in shapes]
            with without_plans():
                expected = outputs(call(*inputs))
            gradients = [torch.randn_like(y) for y in expected]
            inputs = [t.requires_grad_(want and has_gradients) for t, want in zip(inputs, wanted, strict=True)]
            with without_plans():
                expected = run(inputs, gradients)
            got = run(inputs, gradients)
            for a, b in zip(got, expected, strict=True):
                assert_same(a, b)
            assert not any(y._is_view() for y in got[0])
    assert made(kept) >= 1 + (any(wanted) and has_gradients)
    assert Instead.NEVER not in found(kept)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_training(options, implementation, seed, device, kept):
    """Losses, weights and statistics after steps whose weights and inputs are others each time."""
    planned = FastUNet(1, 2, (3, 4), **options).to(device)
    twin = copy.deepcopy(planned)
    steps = 4 if implementation == "torch" else 3
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (planned, twin)]
    with dispatch.forced(implementation):
        for _ in range(steps):
            x, losses = torch.randn(2, 1, 8, 10, device=device), []
            for model, optimizer, how in zip(
                (planned, twin), optimizers, (contextlib.nullcontext(), without_plans()), strict=True
            ):
                with how:
                    optimizer.zero_grad()
                    losses.append(model(x).square().mean())
                    losses[-1].backward()
                    optimizer.step()
            assert torch.equal(*losses)
    assert_same([*planned.parameters(), *planned.buffers()], [*twin.parameters(), *twin.buffers()])
    assert made(kept) > 5 and Instead.NEVER not in found(kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype, seed, device, kept):
    model = FastUNet(1, 2, (3, 4), norm="batch").to(device)
    for _ in range(4):
        x, gradients = torch.randn(2, 1, 8, 10, device=device), []
        for how in (contextlib.nullcontext(), without_plans()):
            model.zero_grad()
            with dispatch.forced("torch"), torch.autocast(device, dtype), how:
                loss = model(x).float().square().mean()
                (loss * 256).backward()
            gradients.append([p.grad for p in model.parameters()])
        assert_same(*gradients)
    assert made(kept)


def test_saved_tensors_are_unpacked_once(seed, device, kept):
    """As checkpoints want it."""
    model = FastUNet(1, 2, (3, 4), norm="instance").to(device)
    unpacked: list[int] = []
    numbers = iter(range(10**6))

    def unpack(packed: tuple[int, Tensor]) -> Tensor:
        unpacked.append(packed[0])
        return packed[1]

    with dispatch.forced("torch"):
        for _ in range(4):
            x = torch.randn(2, 1, 8, 10, device=device)
            with without_plans():
                model(x).square().mean().backward()
            expected = [p.grad for p in model.parameters()]
            model.zero_grad()
            with saved_tensors_hooks(lambda t: (next(numbers), t), unpack):
                checkpoint(model, x, use_reentrant=False).square().mean().backward()  # pyright: ignore
            assert_same([p.grad for p in model.parameters()], expected)
            model.zero_grad()
    assert unpacked and len(set(unpacked)) == len(unpacked) and made(kept)


def test_arguments_in_the_same_memory(seed, device, kept):
    """By no plan while they overlap, which would take two that are apart for one."""
    weight = torch.randn(4, 5, 3, 3, device=device)
    with dispatch.forced("torch"):
        for together in (True, True, True, False, False, True, False):
            both = torch.randn(2, 5, 6, 8, device=device)
            x, skip = both[:, :3], both[:, 3:]
            if not together:
                x, skip = (torch.empty_strided(t.shape, t.stride(), device=device).copy_(t) for t in (x, skip))
            with without_plans():
                expected = ops.upsample_concat_conv2d_relu(x, skip, weight, mode="none")
            assert torch.equal(ops.upsample_concat_conv2d_relu(x, skip, weight, mode="none"), expected)
        assert made(kept) == (not together)


def test_weights_that_are_parts_of_one_vector(seed, device, kept):
    """As flat parameters and gathered ones are; and next those that are not."""
    model = FastUNet(1, 2, (3, 4), norm="batch").to(device)
    for flat in (True, True, True, False, False):
        twin = copy.deepcopy(model)
        if flat:
            vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())
        for run, how in ((model, contextlib.nullcontext()), (twin, without_plans())):
            run.zero_grad()
            with dispatch.forced("torch"), how:
                torch.manual_seed(seed)
                run(torch.randn(2, 1, 8, 10, device=device)).square().mean().backward()
        assert_same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    assert made(kept) > 5 and Instead.NEVER not in found(kept)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_plans_hold_no_map_and_no_graph(implementation, seed, device, kept):
    """Nor what an empty argument is a part of."""
    x, weight = torch.randn(1, 3, 3, 4, device=device), torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    with dispatch.forced(implementation):
        for _ in range(3):
            skip = (torch.randn(1, 2, 6, 8, device=device, requires_grad=True) * 2).square()
            ops.upsample_concat_conv2d_relu(x, skip[:, :0], weight).sum().backward()
            ops.upsample_concat(x, skip[:, :0]).sum()
    steps = [step for entry in found(kept) if isinstance(entry, Plan) for step in entry.steps]
    arguments = [a for step in steps if isinstance(step, (plan.Again, plan.Call)) for a in step.arguments]
    held = [a for a in arguments if isinstance(a, Tensor)]
    assert made(kept) >= 2 and all(t.grad_fn is None and not t.untyped_storage().nbytes() for t in held)


@pytest.mark.parametrize(
    "as_gradient",
    [lambda g: TwoTensor(g, g.clone()), lambda g: torch.ops.aten._efficientzerotensor(g.shape, device=g.device)],
)
def test_gradients_that_are_no_plain_tensors(as_gradient, seed, device, kept):
    weight = torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    with dispatch.forced("torch"):
        for special in (True, True, True, False, False, False, True):
            y = ops.conv2d_relu(torch.randn(2, 3, 6, 8, device=device), weight)
            gradient = torch.randn_like(y)
            gradient = as_gradient(gradient) if special else gradient
            with without_plans():
                (expected,) = torch.autograd.grad(y, weight, gradient, retain_graph=True)
            (got,) = torch.autograd.grad(y, weight, gradient)
            assert type(got) is type(expected)
            assert torch.equal(*(t.a if isinstance(t, TwoTensor) else t for t in (got, expected)))
    assert made(kept) == 2


def test_what_another_thread_asks_of_cudnn_is_not_written_down(seed, device, kept):
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with repeatable_cudnn():
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(60)
    try:
        with dispatch.forced("torch"):
            for _ in range(2):
                ops.conv2d_relu(
                    torch.randn(2, 3, 6, 8, device=device), torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
                )
    finally:
        done.set()
        thread.join()
    (entry,) = found(kept)
    assert isinstance(entry, Plan) and not any(step.repeats for step in entry.steps if isinstance(step, plan.Call))


def test_what_pytorch_chooses_its_operators_by(seed, device, kept):
    given = torch.randn(2, 3, 6, 8, device=device), torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.enabled
    try:
        with dispatch.forced("torch"):
            for deterministic, cudnn in ((False, True), (True, True), (False, False)):
                torch.use_deterministic_algorithms(deterministic)
                torch.backends.cudnn.enabled = cudnn
                for _ in range(3):
                    ops.conv2d_relu(*given)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.enabled = before[1]
    assert made(kept) == 3


def test_a_gradient_in_the_memory_of_a_result(seed, device, kept):
    """Which is saved for it."""
    weight = torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    for shared in (True, False, True, False, True):
        x = torch.randn(2, 3, 6, 8, device=device)
        with dispatch.forced("triton"):
            y = ops.conv2d_relu(x, weight)
            gradient = y.detach() if shared else y.detach().clone()
            with without_plans():
                (expected,) = torch.autograd.grad(y, weight, gradient, retain_graph=True)
            (got,) = torch.autograd.grad(y, weight, gradient)
        assert torch.equal(got, expected)


def test_results_may_be_changed_in_place(seed, device, kept):
    with dispatch.forced("triton"):
        for channels in (1, 4):
            weight = torch.randn(channels, 3, 3, 3, device=device, requires_grad=True)
            for _ in range(4):
                y = ops.conv2d_relu(torch.randn(2, 3, 6, 1, device=device), weight, relu=False)
                y.mul_(2).sum().backward()
    assert made(kept) == 4


def test_gradients_of_gradients_are_refused_as_before(seed, device, kept):
    weight = torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    with dispatch.forced("torch"):
        for _ in range(4):
            y = ops.conv2d_relu(torch.randn(2, 3, 6, 8, device=device), weight)
            (grad,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
            with pytest.raises(RuntimeError, match="conv2d_relu: gradients of gradients"):
                grad.sum().backward()


def test_new_measurements_are_chosen_by(seed, device, kept, monkeypatch):
    tables = [object()]
    monkeypatch.setattr(dispatch, "table", lambda device: tables[-1])
    given = torch.randn(2, 3, 6, 8, device=device), torch.randn(4, 3, 3, 3, device=device)
    recorded: list[Any] = []
    record = planned.recorded
    monkeypatch.setattr(planned, "recorded", lambda *arguments: (recorded.append(1), record(*arguments))[1])
    with dispatch.forced("torch"):
        for _ in range(2):
            for _ in range(3):
                ops.conv2d_relu(*given)
            tables.append(object())
    assert len(recorded) == 2 and made(kept) == 1


def test_a_compiled_step_goes_by_plans_too(seed, device, kept):
    model = FastUNet(1, 2, (2, 3), norm="batch").to(device)
    step = torch.compile(lambda x: model(x).square().mean(), backend="aot_eager", fullgraph=True)
    with dispatch.forced("triton"):
        for _ in range(3):
            x, gradients = torch.randn(2, 1, 5, 6, device=device), []
            for how, run in ((contextlib.nullcontext(), step), (without_plans(), lambda x: model(x).square().mean())):
                model.zero_grad()
                with how:
                    run(x).backward()
                gradients.append([p.grad for p in model.parameters()])
            assert_same(*gradients)
    assert made(kept) > 5


def test_who_looks_on_gets_no_plan(seed, device, kept):
    weight = torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    with dispatch.forced("torch"), ops.watched():
        for _ in range(4):
            ops.conv2d_relu(torch.randn(2, 3, 6, 8, device=device), weight).sum().backward()
    assert not found(kept)


def test_a_weight_known_to_be_rounded_is_of_another_kind(seed):
    """Its plan would not round one that is not."""
    weight = torch.randn(8, 3, 3, 3)
    rounded = kernels.tf32.marked_as_rounded(weight.clone())
    assert kernels.tf32.is_rounded(rounded) and not kernels.tf32.is_rounded(rounded.clone())
    assert kind(weight, None) == kind(weight.clone(), None) != kind(rounded, None)
    rounded.mul_(1.1)
    assert not kernels.tf32.is_rounded(rounded) and kind(weight, None) == kind(rounded, None)


def test_the_least_recently_used_go(seed, device, kept, monkeypatch):
    monkeypatch.setattr(operator, "KEPT", 3)
    weight = torch.randn(4, 3, 3, 3, device=device)
    with dispatch.forced("torch"):
        for size in (4, 5, 6, 7, 8):
            for _ in range(3):
                ops.conv2d_relu(torch.randn(2, 3, 6, size, device=device), weight)
    assert made(kept) == 3
