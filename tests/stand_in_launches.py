"""What kernels compiled for sm_90a are launched with, by a forward pass and by the plan of it.

    python tests/stand_in_launches.py [triton] [hopper]

A driver that stands in for the GPU takes the launches. Exits 1 where a plan's differ from the pass's own. Their memory
is another, so what is compared of it is which arguments share it.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastunet import FastUNet, dispatch
from fastunet.ops import operator
from fastunet.ops.recorder import recorded
from fastunet.prepared import laid_out

Launches = list[tuple[Any, ...]]


class StandIn:
    """A driver of an H200 that keeps what it is to launch."""

    def __init__(self) -> None:
        self.launches: Launches = []
        self.utils, self.loaded = self, 0
        stand_in = self

        class Launcher:
            def __init__(self, src: Any, metadata: Any) -> None:
                pass

            def __call__(self, *arguments: Any) -> None:
                x, y, z, stream, function, packed, _for_hooks, *rest = arguments
                stand_in.launches.append((function, x, y, z, stream, packed, *rest))

        self.launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        self.loaded += 1
        return 0, self.loaded, 32, 0, 1024

    def taken(self) -> Launches:
        found, self.launches = self.launches, []
        return found


def addresses(launches: Launches) -> set[int]:
    given = [getattr(argument, "base", argument) for launch in launches for argument in launch]
    return {x.data_ptr() for x in given if isinstance(x, Tensor)}


def shown(launches: Launches, constant: set[int]) -> list[list[Any]]:
    """The launches with memory as the number of its first appearance, and weights by their address.

    The launches hold memory, so that none is used twice.
    """
    numbers: dict[int, int] = {}

    def show(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            address = argument.data_ptr()
            place = address if address in constant else numbers.setdefault(address, len(numbers))
            return place, argument.dtype
        if hasattr(argument, "block_shape"):
            fields = {name: value for name, value in vars(argument).items() if name != "base"}
            return show(argument.base), str(sorted(fields.items()))
        return argument

    return [[show(argument) for argument in launch] for launch in launches]


def differ(what: str, own: Launches, again: Launches) -> bool:
    """Whether a plan's launches are not the pass's own, and at which the first difference is."""
    constant = addresses(own) & addresses(again)
    assert len(constant) > 4, "weights and biases"
    for i, (theirs, ours) in enumerate(zip(shown(own, constant), shown(again, constant), strict=True)):
        if theirs != ours:
            print(f"{what}, launch {i}:\n  {theirs}\n  {ours}")  # noqa: T201
            return True
    kinds = len({launch[0] for launch in own})
    print(f"Triton {triton.__version__}, {what}: {len(own)} launches of {kinds} kernels")  # noqa: T201
    return False


def of_a_forward_pass(stand_in: StandIn) -> tuple[Launches, Launches]:
    model = FastUNet(1, 2, (16, 64), norm="batch").half().eval()
    x, other = (torch.randn(1, 1, 18, 20).half() for _ in range(2))
    with torch.no_grad():
        model._forward(x)
        _, plan = recorded(model._forward, [x], [*model.parameters(), *model.buffers(), *laid_out(model._prepared)])
        stand_in.taken()
        model._forward(other)
        own = stand_in.taken()
        plan(other)
    return own, stand_in.taken()


def of_a_training_step(stand_in: StandIn) -> tuple[Launches, Launches]:
    """Whose operators and gradients go by plans of their own."""
    model = FastUNet(1, 2, (16, 64), norm="batch").half()
    x, other = (torch.randn(1, 1, 18, 20).half() for _ in range(2))
    step = lambda x: model(x).sum().backward()
    step(other)
    stand_in.taken()
    step(other)
    own = stand_in.taken()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "_on_gpu", lambda x: True)
        for _ in range(2):
            step(x)
        stand_in.taken()
        step(other)
    return own, stand_in.taken()


def main() -> int:
    stand_in: Any = StandIn()
    driver.set_active(stand_in)
    dispatch.why_not_hopper = lambda device: None
    dispatch.why_not_triton = lambda device, dtype: None
    dispatch.interpreting = lambda: False
    for implementation in sys.argv[1:] or ("triton", "hopper"):
        for pass_of in (of_a_forward_pass, of_a_training_step):
            with dispatch.forced(implementation):
                launches = pass_of(stand_in)
            if differ(f"{implementation}, {pass_of.__name__.replace('_', ' ')}", *launches):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
