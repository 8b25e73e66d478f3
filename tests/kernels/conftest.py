"""One way to check a kernel: against the reference in float64, by the rule that users get."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastunet.parity.rule import compare, tf32_convolutions

from ..conftest import COMPILED

# float32 appears twice: rounded to tf32 on tensor cores, and exact (the interpreter rounds neither,
# but the two take different launch configurations).
PRECISIONS = ("fp16", "bf16", "tf32", "ieee")
if COMPILED:  # they sum one by one, as cuDNN does, where a CPU's baseline sums blocks: exact float32 is not compared
    PRECISIONS = PRECISIONS[:3]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
# In the interpreter each case is of one of either, by seed and name: the two of 16 bits run the same code in the same
# tiles there, the two of 32 the same code, each in tiles of its own.
EITHER = {"half": ("fp16", "bf16"), "single": ("tf32", "ieee")}
TAKEN = PRECISIONS if torch.cuda.is_available() else ("half", "tf32" if COMPILED else "single")
WITHOUT_IEEE = PRECISIONS[:3] if torch.cuda.is_available() else ("half", "tf32")


@pytest.fixture(params=TAKEN)
def precision(request: pytest.FixtureRequest, seed: int) -> str:
    either = EITHER.get(request.param, (request.param,))
    return either[(seed + zlib.crc32(request.node.nodeid.encode())) % len(either)]  # of one seed some cases each


@pytest.fixture
def make(seed: int, device: str) -> Callable[..., Tensor]:
    """make(precision, *shape, fan_in): normal numbers, scaled so that a sum of fan_in is of order 1."""

    def make(precision: str, *shape: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(shape, device=device) / fan_in**0.5).to(DTYPES[precision])

    return make


def far_apart(x: Tensor, axis: int) -> Tensor:
    """A channels-last copy whose last image (axis 0) or row (2) begins beyond 2**31 elements from its start.

    The stride itself fits 32 bits, so that only the kernel's own product can leave them. The memory
    between is reserved and never touched.
    """
    _, c, h, w = x.shape
    far = 2**31 // (x.shape[axis] - 1) + 8
    row = w * c if axis == 0 else far
    stride = (far if axis == 0 else h * row, 1, row, c)
    size = 1 + sum((s - 1) * t for s, t in zip(x.shape, stride, strict=True))
    settings: Any = torch.utils.deterministic
    poisoned, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    memory = x.new_empty(size)
    settings.fill_uninitialized_memory = poisoned
    return memory.as_strided(x.shape, stride).copy_(x)


def _rounded_to_tf32(x: Tensor) -> Tensor:
    """To the nearest; its gradient is that of x."""
    plain = x.detach().contiguous()
    rounded = ((plain.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return x + torch.where(plain.isfinite(), rounded - plain, 0.0)


class RoundedFactors(TorchFunctionMode):
    """A CPU's convolutions of float32 with their factors rounded to tf32, to the nearest."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (F.conv2d, F.conv_transpose2d):
            args = (*map(_rounded_to_tf32, args[:2]), *args[2:])
        return function(*args, **(kwargs or {}))


def rounds_to_tf32(precision: str, got: Tensor) -> bool:
    """Whether that is of products whose factors were rounded."""
    return precision == "tf32" and (got.is_cuda or COMPILED > 0)


def check(
    precision: str,
    got: Tensor,
    reference: Callable[..., Tensor],
    *inputs: Any,
    summed: Callable | None = None,
    stages: int = 1,
) -> None:
    """``got`` must be as near the float64 reference as the reference in the working dtype is.

    ``summed``: of results that are sums over pixels, the map that is summed, whose terms may cancel. ``stages``: of
    operations, one behind another.
    """
    wide = [t.double().cpu() if isinstance(t, Tensor) else t for t in inputs]
    tf32 = rounds_to_tf32(precision, got)
    terms = 0.0 if summed is None or not got.numel() else summed(*wide).square().sum((0, 2, 3)).sqrt().max().item()
    with tf32_convolutions(tf32), RoundedFactors() if COMPILED and tf32 else contextlib.nullcontext():
        baseline = reference(*inputs)
    parity = compare(got, baseline, reference(*wide), tf32=tf32, stages=stages, terms=terms)
    assert parity.ok, str(parity)
    assert got.numel() == 0 or got.is_contiguous(memory_format=torch.channels_last)
