"""Sum of partial sums, always in the same order: what atomics would do in another order each time.

    y[m] = sum over s of partial[s, m]

Tiling: one program sums BLOCK_M columns, BLOCK_S slabs a step. Shapes: partial (S, M), float32,
contiguous -> y (M,).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tuning import FUSION, reduce_blocks


@triton.jit
def _reduce_slabs_kernel(partial_ptr, y_ptr, S, M, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_S, BLOCK_M], tl.float32)
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        mask = (s < S)[:, None] & (m < M)[None, :]
        acc += tl.load(partial_ptr + s.to(tl.int64)[:, None] * M + m[None, :], mask=mask, other=0.0)
    tl.store(y_ptr + m, tl.sum(acc, 0).to(y_ptr.dtype.element_ty), mask=m < M)


def reduce_slabs(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Launch the kernel. Returns y (M,) of ``dtype``."""
    slabs, m = partial.shape
    y = torch.empty(m, dtype=dtype, device=partial.device)
    if m:
        block_s, block_m = reduce_blocks(slabs)
        launch(
            _reduce_slabs_kernel, (triton.cdiv(m, block_m),),
            partial, y, slabs, m, BLOCK_S=block_s, BLOCK_M=block_m, num_warps=4, **FUSION,
        )  # fmt: skip
    return y
