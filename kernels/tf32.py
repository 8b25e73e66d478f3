"""float32 rounded to tf32, to the nearest, before tensor cores see it.

Of a float32 factor they look at the upper 19 bits: they truncate. All factors are then too small, by 2**-11.5 on
average, and so is every map, by twice that more from layer to layer; rounded, their errors have no sign and grow as
the root of the layers (benchmarks/NOTES.md). Pixels are rounded where they are loaded, by TMA or in registers;
weights, which WGMMA wants straight from shared memory, beforehand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tuning import FUSION

_BLOCK = 1024
_MARK = "rounded_to_tf32"


@triton.jit
def rounded_to_tf32(x):
    """The nearest tf32, of ties the one away from 0, of float32; others as they are."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [bits], tl.int32, is_pure=True, pack=1)
        x = bits.to(tl.float32, bitcast=True)
    return x


@triton.jit
def _round_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, rounded_to_tf32(tl.load(x_ptr + i, mask=i < n, other=0.0)), mask=i < n)


def rounded_weight(weight: Tensor, tf32: bool, of: Tensor | None = None) -> Tensor:
    """``weight``, without gaps, rounded where its products are in tf32 and ``of`` is not yet, whose elements it has."""
    if not tf32 or weight.dtype != torch.float32 or is_rounded(weight if of is None else of):
        return weight
    if triton.knobs.runtime.interpret:  # whose products are exact
        return weight
    y, n = torch.empty_like(weight), weight.numel()
    if n:
        launch(_round_kernel, (triton.cdiv(n, _BLOCK),), weight, y, n, BLOCK=_BLOCK, num_warps=4, **FUSION)
    setattr(y, _MARK, True)
    return y


def is_rounded(weight: Tensor) -> bool:
    """Whether it is known to be, as a Python object: what is made of it is rounded once more, to the same."""
    return getattr(weight, _MARK, False)
