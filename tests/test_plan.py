"""Plans of a forward pass: the same bits as the pass itself, when one is made, and when it no longer holds."""

from __future__ import annotations

import copy
import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from fastunet import FastUNet, dispatch, graph, kernels, ops, reference
from fastunet.ops import operator, plan, planned
from fastunet.ops.recorder import recorded
from fastunet.parity.fuzz import _draw_network, randomise
from fastunet.plan import Plans
from fastunet.prepared import laid_out
from fastunet.sources import parts

pytestmark = pytest.mark.usefixtures("poisoned")

NETWORKS: list[dict[str, Any]] = [
    {},
    {"norm": "batch"},
    {"norm": "batch", "order": "conv_act_norm"},  # whose statistics are cast, and rooted, once
    {"norm": "instance"},
    {"upsample": "transpose", "concat": "skip_first"},
    {"upsample": "nearest_conv", "match": "replicate_pad"},  # the padding is PyTorch's
    {"upsample": "bilinear_conv", "final_activation": "sigmoid"},  # as is the last step
]


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU's maps are taken for a GPU's, and operators run, on PyTorch where the kernels are not looked at."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(graph, "_on_gpu", lambda x: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        uncached: Any = reference._standard  # as there
        monkeypatch.setattr(reference, "_standard", uncached.__wrapped__)
    monkeypatch.setattr(operator, "_on_gpu", lambda x: False)  # whose plans are of single operators
    with dispatch.forced("triton" if torch.cuda.is_available() else "torch"), torch.no_grad():
        yield


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that a plan was made for."""
    made: list[tuple[int, ...]] = []

    def record(forward: Callable[[Tensor], Tensor], arguments: tuple[Tensor], constants: list[Tensor]) -> Any:
        found = recorded(forward, arguments, constants)
        made.append(tuple(arguments[0].shape))
        return found

    monkeypatch.setattr(planned, "recorded", record)
    return made


@pytest.fixture
def model(seed: int, device: str) -> FastUNet:
    # Every channel is alive, so that a change of any weight is one of the output.
    return FastUNet(1, 2, (4, 8), norm="batch", activation="leaky_relu").to(device).eval()


def inputs(device: str, count: int = 4, *shape: int) -> list[Tensor]:
    return [torch.randn(shape or (1, 1, 9, 10), device=device) for _ in range(count)]


def assert_same(y: Tensor, expected: Tensor) -> None:
    assert torch.equal(y, expected) and y.stride() == expected.stride() and y.dtype == expected.dtype
    assert not y._is_view()


@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_same_bits(options, seed, device, plans):
    dtype = (torch.float32, torch.float16)[seed % 2]
    model = FastUNet(2, 3, (4, 6), **options)
    randomise(model, seed)
    model.to(device, dtype).eval()
    with dispatch.forced("triton"):
        for x in inputs(device, 3, 2, 2, 7, 9):
            x = x.to(dtype)
            assert_same(model(x), model._forward(x))
    assert plans == [(2, 2, 7, 9)]


@pytest.mark.parametrize("autocast", [False, True], ids=["as-it-is", "autocast"])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("norm", [None, "batch"], ids=str)
def test_in_inference_mode(norm, implementation, autocast, seed, device, plans):
    """Where operators of PyTorch come whole that are taken apart elsewhere; of an input that wants another layout."""
    channels = kernels.STEM_CHANNELS + 2
    model = FastUNet(channels, 2, (4, 6), norm=norm).to(device).eval()
    narrow = torch.autocast(device, torch.bfloat16, enabled=autocast)
    with torch.inference_mode(), dispatch.forced(implementation), narrow:
        for x in inputs(device, 4, 1, channels, 7, 9):
            assert torch.equal(model(x), model._forward(x))
    assert plans


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_any_network(data, seed, device):
    torch.manual_seed(seed)
    config = _draw_network(data.draw, st.integers(1, 6), 3, 2)
    model = FastUNet.from_config(config)
    randomise(model, seed)
    model.to(device).eval()
    size = [-(-2 * config.minimum_size // step) * step for step in config.reductions]
    with dispatch.forced("triton"):
        for x in inputs(device, 3, 1, config.in_channels, *size):
            assert_same(model(x), model._forward(x))


def test_one_plan_for_each_kind_of_input(model, device, plans):
    a, b = torch.rand(1, 1, 8, 8, device=device), torch.rand(2, 1, 8, 8, device=device)
    odd = torch.rand(65, device=device)[1:].view(1, 1, 8, 8)  # of memory that is not aligned
    for x in (a, b, a, b, a + 1, b + 1):
        assert_same(model(x), model._forward(x))
    assert plans == [(1, 1, 8, 8), (2, 1, 8, 8)]
    for other in (a.transpose(2, 3), odd):
        for x in (other, other):
            assert_same(model(x), model._forward(x))
    with torch.autocast(device, torch.bfloat16):
        assert_same(model(a), model._forward(a))
        assert_same(model(a), model._forward(a))
    with torch.inference_mode():
        assert model(a).is_inference() and model(a).is_inference() and model(a).is_inference()
    assert len(plans) == 6
    assert not model(a).is_inference()
    with dispatch.forced("triton"):
        model(a)
    assert len(plans) == 6


def test_of_weights_that_change_there_is_one_generation(model, device, plans):
    """Not a plan of each size, with weights of its time."""
    for size in range(8, 14):
        model.head.weight.add_(1)
        for x in inputs(device, 3, 1, 1, size, size):
            assert_same(model(x), model._forward(x))
    (_, *layers), tensors = parts(model)
    objects = [*layers, model.config, dispatch.table(model.head.weight.device)]
    assert len(model._plans._kept.made_from(tensors, objects)._made) == 1 and len(plans) == 6


def test_a_plan_of_weights_that_change_meanwhile_is_not_taken(device, seed):
    weight, (x, *_) = torch.ones(1, device=device), inputs(device, 1)
    change = []

    def forward(x: Tensor) -> Tensor:
        y = x * weight
        if change:  # as another thread might
            change.pop()
            with _disable_current_modes():
                weight.add_(1)
        return y

    plans = Plans()
    for now in ([], [1], [], [], []):
        change.extend(now)
        plans(forward, x, [weight], [], lambda: [weight])
    assert torch.equal(plans(forward, x, [weight], [], lambda: [weight]), 2 * x)


def test_a_part_of_a_larger_map(model, device, plans):
    """Which begins elsewhere each time."""
    whole = torch.rand(3, 2, 12, 14, device=device)
    for top, left, image in [(0, 0, 0), (4, 2, 1), (3, 6, 2), (1, 5, 0)]:
        x = whole[image : image + 1, :1, top : top + 8, left : left + 8]
        assert_same(model(x), model._forward(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.head.weight.add_(1),
        lambda m: m.bottleneck.net[1].running_mean.add_(1),
        lambda m: m.load_state_dict(FastUNet(1, 2, (4, 8), norm="batch").state_dict()),
        lambda m: setattr(m.head, "bias", nn.Parameter(torch.ones_like(m.head.bias))),
        lambda m: m.half().float(),
        lambda m: (m.head.weight.data.add_(1), m.refresh()),
        lambda m: m.bottleneck.net.__setitem__(2, nn.SiLU()),
        lambda m: setattr(m, "config", dataclasses.replace(m.config, final_activation="sigmoid")),
        lambda m: as_a_plain_attribute(m.head),
    ],
    ids=[
        "in-place",
        "running-statistic",
        "load_state_dict",
        "new-parameter",
        "to",
        "data-and-refresh",
        "layer",
        "config",
        "plain-attribute",
    ],
)
def test_what_changed_is_seen(change, model, device, plans):
    x, *others = inputs(device)
    for other in (*others, x):
        model(other)
    before = model(x)
    change(model)
    for other in (x, *inputs(device)):
        assert_same(model(other), copy.deepcopy(model)._forward(other))
    assert not torch.equal(before, model._forward(x))


def as_a_plain_attribute(layer: Any) -> None:
    weight = layer.weight.detach() * 2
    del layer.weight
    layer.weight = weight


class Scaled(nn.Module):
    """A parametrization whose strength nobody counts the versions of."""

    scale = 1.0

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale * weight


def test_a_weight_that_is_made_in_each_pass_gets_no_plan(model, device, plans):
    scaled = Scaled()
    parametrize.register_parametrization(model.head, "weight", scaled)
    x, *others = inputs(device)
    for other in (*others, x):
        assert_same(model(other), model._forward(other))
    scaled.scale = 3.0
    assert_same(model(x), model._forward(x))
    assert not plans


def test_replicas_of_data_parallel_share_nothing(model, device):
    model(*inputs(device, 1))
    replica = model._replicate_for_data_parallel()
    assert "_plans_by_input" in model.__dict__ and "_prepared_weights" in model.__dict__
    assert "_plans_by_input" not in replica.__dict__ and "_prepared_weights" not in replica.__dict__


def test_a_default_device_is_no_mode_that_looks_on(model, device, plans):
    torch.set_default_device(device)
    try:
        for x in inputs(device):
            assert_same(model(x), model._forward(x))
    finally:
        torch.set_default_device(None)
    assert plans


def test_new_measurements_are_chosen_by(model, device, monkeypatch, plans):
    tables = [object()]
    monkeypatch.setattr(dispatch, "table", lambda device: tables[-1])
    (x,) = inputs(device, 1)
    for _ in range(3):
        model(x)
    tables.append(object())
    for _ in range(3):
        model(x)
    assert len(plans) == 2


def test_where_a_plan_would_not_say_the_same(model, device, plans, monkeypatch):
    (x,) = inputs(device, 1)

    class Mode(TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += func in (F.conv2d, torch.conv2d) or getattr(func, "namespace", None) == "fastunet"
            return func(*args, **(kwargs or {}))

    def thrice() -> None:
        for _ in range(3):
            model(x)

    with torch.enable_grad():
        thrice()
        model(x).sum().backward()
        for p in model.parameters():
            p.requires_grad_(False)
        model(x.clone().requires_grad_()).sum().backward()
    with ops.watched():
        thrice()
    with Mode() as mode:
        thrice()
    assert mode.seen >= 15 and model.head.weight.grad is not None
    model.bottleneck.net[1].train()
    thrice()
    model.eval()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    thrice()
    assert not plans and model._plans._kept._now is None


def test_frozen_weights_need_no_no_grad(model, device, plans):
    model.requires_grad_(False)
    with torch.enable_grad():
        for x in inputs(device):
            assert_same(model(x), model._forward(x))
    assert plans


def test_a_network_that_is_not_as_built_runs_as_it_is(model, device, plans):
    model.bottleneck.net[2] = nn.Hardswish()
    seen = []
    model.bottleneck.register_forward_hook(lambda *_: seen.append(1))
    for x in inputs(device):
        assert_same(model(x), model._forward(x))
    assert not plans and len(seen) == 8


def test_a_model_is_let_go_of_at_once(model, device, plans):
    """With its memory: by no cycle, for which the collector would have to come by."""
    twin = copy.deepcopy(model)
    for x in inputs(device):
        twin(x)
    gone = weakref.ref(twin)
    gc.disable()
    try:
        del twin
        assert plans and gone() is None
    finally:
        gc.enable()


def test_a_plan_holds_no_map(device, seed):
    """But weights: what is recorded is let go, boxes of it too."""
    model = FastUNet(1, 2, (64, 64)).to(device).half().eval()
    x = torch.rand(1, 1, 4, 4, device=device).half()
    with dispatch.forced("triton"):
        model._forward(x)
        _, again = recorded(model._forward, [x], [*model.parameters(), *laid_out(model._prepared)])
    launches = [step for step in again.steps if isinstance(step, plan.Again)]
    boxes = [d for step in launches for *_, d in step.moving if d is not None]
    assert boxes and all(box.base is None for box in boxes)
    weights = {t.data_ptr() for t in laid_out(model._prepared)}
    calls = [step for step in again.steps if isinstance(step, plan.Call)]
    for argument in [a for step in launches for a in step.arguments] + [a for step in calls for a in step.arguments]:
        held = getattr(argument, "base", argument)
        assert not isinstance(held, Tensor) or held.untyped_storage().data_ptr() in weights
        assert not isinstance(held, torch.UntypedStorage)


def test_copies_make_their_own(model, device, plans):
    x, *others = inputs(device)
    for other in (*others, x):
        model(other)
    twin = copy.deepcopy(model)
    twin.head.bias.add_(1)
    assert_same(twin(x), twin._forward(x))
    assert_same(model(x), model._forward(x))


def test_threads(model, device, plans):
    right = []

    def work(x: Tensor) -> None:
        with torch.no_grad(), dispatch.forced("torch"):
            right.extend(torch.equal(model(x), model._forward(x)) for _ in range(30))

    threads = [threading.Thread(target=work, args=(x,)) for x in inputs(device)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == 120 * [True] and 1 <= len(plans) <= 4
