"""What functions of PyTorch's own operators do, written down: the same bits again; and what cannot be written down."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.ops import plan
from fastunet.ops.common import repeatable_cudnn
from fastunet.ops.planned import Instead, kind
from fastunet.ops.recorder import recorded
from fastunet.plan import Plans

from ..test_plan import assert_same, inputs

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# Of PyTorch's own operators: a table may prefer them, and what we have no kernel for is theirs.
WEIGHT = torch.randn(3, 2, 3, 3)
PASSES = {
    "convolution and pool": lambda x: F.max_pool2d(F.conv2d(x, WEIGHT.to(x)), 2),
    "in place, of a view": lambda x: (y := x * 2, y[:, 1:].add_(x[:, :1]).relu_(), y + 1)[-1],
    "the input": lambda x: x.add(1).mul_(x),
    "several results": lambda x: math.prod(F.max_pool2d_with_indices(x, [2, 2])),
    "cut and joined": lambda x: torch.cat([t.exp() for t in x.split(1, 1)] + [x[..., 1:3, 1:3].mean((2, 3), True)
                                                                              .expand_as(x)], 1),
    "made of weights": lambda x: x * (WEIGHT.to(x).square().sum() + 1).rsqrt(),
    "zeros that are added to": lambda x: torch.zeros_like(x).add_(x),
    "a part of the result": lambda x: (x * 3)[:, :1].clone(),
}  # fmt: skip


@pytest.mark.parametrize("forward", PASSES.values(), ids=PASSES)
def test_of_pytorchs_own_operators(forward, seed, device):
    x, *others = inputs(device, 4, 2, 2, 6, 5)
    y, again = recorded(forward, [x], [WEIGHT])
    assert torch.equal(y, forward(x))
    for x in others:
        kept = x.clone()
        assert_same(again(x), forward(kept))


def test_cudnn_is_asked_to_repeat_where_the_pass_asked(seed, device):
    """Of what a plan calls; and not elsewhere, whatever was asked for when it was made."""
    x, other = inputs(device, 2, 2, 2, 6, 5)

    def forward(x: Tensor) -> Tensor:
        with repeatable_cudnn():
            x = F.conv2d(x, WEIGHT.to(x))
        return x + 1

    _, again = recorded(forward, [x], [WEIGHT])
    calls = {str(step.function): step.repeats for step in again.steps if isinstance(step, plan.Call)}
    assert calls == {"aten.convolution.default": True, "aten.add.Tensor": False}
    flags = lambda: (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    before = flags()
    assert_same(again(other), forward(other))
    assert flags() == before


def test_a_part_of_a_map_is_given_with_its_strides(seed, device):
    x, other = inputs(device, 2, 2, 2, 6, 5)
    forward = lambda x: (x * 3)[:, 1:].transpose(2, 3)
    _, again = recorded(forward, [x], [WEIGHT])
    assert_same(again(other), forward(other))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x * 2 if x.sum() > 0 else x * 3,
        lambda x: x * (WEIGHT.to(x) * 1).add_(WEIGHT.to(x).mean()).sum(),
        lambda x: WEIGHT.to(x).sum() * 2,
        lambda x: x.view(torch.int32).bitwise_not().view(torch.float32),
        lambda x: x * x.as_strided((1,), (1,), x.storage_offset() + x.numel() - 1 + 8),
        lambda x: x * torch.tensor([2.0], device=x.device),
    ],
    ids=[
        "reads a value",
        "changes what is made once",
        "is not of its input",
        "takes memory for another dtype",
        "reads a weight in the input's memory",
        "reads what nobody saw being filled",
    ],
)
def test_what_no_plan_can_do_is_done_as_before(forward, seed, device):
    plans = Plans()
    one, *others = inputs(device, 5, 2, 1, 9, 10)
    for i, x in enumerate([*others, one]):
        x = (x.abs() if (seed + i) % 2 else -x.abs())[:1]
        y = plans(forward, x, [], [], lambda: [WEIGHT])
        assert torch.equal(y.nan_to_num(), forward(x).nan_to_num())
    assert plans._kept.made_from([]).find(kind(one[:1])) is Instead.NEVER


def test_memory_is_let_go_of_behind_its_last_reader(seed, device):
    """That of results which nobody reads at once."""

    def forward(x: Tensor) -> Tensor:
        for _ in range(6):
            x, _ = F.max_pool2d_with_indices(x, [3, 3], [1, 1], [1, 1])
        return x

    _, again = recorded(forward, [torch.rand(1, 1, 4, 4, device=device)], [])
    held: list[Any] = [torch.rand(1, 1, 4, 4, device=device)] + [None] * (again.slots - 1)
    most = 0
    for step in again.steps:
        step(held)
        most = max(most, sum(t is not None for t in held))
    (result,) = again.results
    assert most == 2 and isinstance(result, plan.View)
    assert [i for i, t in enumerate(held) if t is not None] == [result.slot]
