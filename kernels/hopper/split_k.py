"""The sum of a split K loop's shares, then factor and bias, activation and 2x2 max-pool.

    y[n, o, h, w]      = act(b[o] + f[o] sum over s of shares[s, n, h, w, o])
    pooled[n, o, h, w] = max of the four y[n, o, 2h + {0, 1}, 2w + {0, 1}]

Tiling: one program takes BLOCK_P windows of 2 x 2 pixels and BLOCK_C channels. The shares are added
in their order, so the result is the same each time. Shapes: shares (S, N, H, W, O) float32,
contiguous; b (O,), or f and b (2, O); y (N, O, H, W) of unit channel stride; pooled channels_last.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..tensors import scaled
from ..tuning import PointwiseConfig, power_of_2


@triton.jit
def _sum_splits_kernel(
    shares_ptr, bias_ptr, y_ptr, pooled_ptr,
    N, H, W, O, stride_yn, stride_yh, stride_yw,
    SPLITS: tl.constexpr, SCALED: tl.constexpr, SLOPE: tl.constexpr, POOL: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    windows_w = tl.cdiv(W, 2)
    windows_h = tl.cdiv(H, 2)
    n = window // windows_w // windows_h
    h2 = window // windows_w % windows_h
    w2 = window % windows_w
    if SCALED:
        factor = tl.load(bias_ptr + c, mask=c < O, other=0.0).to(tl.float32)
        bias_ptr += O
    bias = tl.load(bias_ptr + c, mask=c < O, other=0.0).to(tl.float32)
    largest = tl.full([BLOCK_P, BLOCK_C], float("-inf"), tl.float32)
    for i in tl.static_range(4):
        h = 2 * h2 + i // 2
        w = 2 * w2 + i % 2
        mask = ((n < N) & (h < H) & (w < W))[:, None] & (c < O)[None, :]
        acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for s in range(SPLITS):
            pixel = ((s * N + n) * H + h) * W + w
            acc += tl.load(shares_ptr + pixel[:, None] * O + c[None, :], mask=mask, other=0.0)
        if SCALED:
            acc *= factor[None, :]
        acc += bias[None, :]
        if SLOPE == 0.0:
            acc = tl.where(acc <= 0, 0.0, acc)
        elif SLOPE != 1.0:
            acc = tl.where(acc <= 0, acc * SLOPE, acc)
        offset = n * stride_yn + h * stride_yh + w * stride_yw
        tl.store(y_ptr + offset[:, None] + c[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)
        largest = tl.maximum(largest, acc, propagate_nan=tl.PropagateNan.ALL)
    if POOL:
        pixel = (n * (H // 2) + h2) * (W // 2) + w2
        mask = ((n < N) & (h2 < H // 2) & (w2 < W // 2))[:, None] & (c < O)[None, :]
        tl.store(pooled_ptr + pixel[:, None] * O + c[None, :], largest.to(pooled_ptr.dtype.element_ty), mask=mask)


def sum_splits(shares: Tensor, bias: Tensor, y: Tensor, pooled: Tensor | None, slope: float) -> None:
    """Fill ``y`` and, if given, ``pooled``."""
    splits, n, h, w, o = shares.shape
    block_c = power_of_2(o, 16, 64)
    grid = (triton.cdiv(n * triton.cdiv(h, 2) * triton.cdiv(w, 2), 1024 // block_c), triton.cdiv(o, block_c))
    launch(
        _sum_splits_kernel, grid,
        shares, bias, y, pooled, n, h, w, o, y.stride(0), y.stride(2), y.stride(3),
        SPLITS=splits, SCALED=scaled(bias), SLOPE=slope, POOL=pooled is not None,
        **PointwiseConfig(block_p=1024 // block_c, block_c=block_c, num_warps=4).options(),
    )  # fmt: skip
