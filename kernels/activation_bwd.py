"""From the gradient of a convolution's outputs to that of its sums: pool, activation, bias in one pass.

The same for a norm's outputs, with the two sums that its own gradient wants (norm.py).

    g[n, o, h, w] = act'(y[n, o, h, w]) (grad[n, o, h, w] + grad_pooled[n, o, h // 2, w // 2] [(h, w) is its maximum])
    grad_bias[o]  = sum over n, h, w of g;  behind a norm also the sum of g (x - mean) rstd

``y`` is the saved output: its sign is that of the sum before a ReLU, and the place of each maximum
is found in it again by torch's rule (the first of equal values in reading order, the last NaN if
there is one), so that neither the sums nor the places are saved.

Tiling: one program takes BLOCK_C channels of a slab of 2x2 cells, BLOCK_P cells a step, and leaves
its share of the bias gradient for reduce_slabs.py; behind a norm a slab is of one of the G groups of images that
share statistics.

Shapes: grad (N, O, H, W) and grad_pooled (N, O, H // 2, W // 2) of any strides, y (N, O, H, W)
-> g (N, O, H, W), channels_last, grad_bias (O,); float16, bfloat16 or float32, sums in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .reduce_slabs import reduce_slabs
from .tensors import empty_channels_last, without_graph
from .tuning import PointwiseConfig, cell_config, slabs


@triton.jit
def _activation_bwd_kernel(
    grad_ptr, grad_pooled_ptr, y_ptr, x_ptr, mean_ptr, rstd_ptr, g_ptr, sums_ptr,
    G, images, H, W, O, steps,
    stride_gn, stride_gc, stride_gh, stride_gw, stride_pn, stride_pc, stride_ph, stride_pw,
    SLOPE: tl.constexpr, POOL: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(O, BLOCK_C)
    slab = (tl.program_id(0) // blocks).to(tl.int64)
    group, slab = slab % G, slab // G
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    cells_h, cells_w = tl.cdiv(H, 2), tl.cdiv(W, 2)
    channels = c.to(tl.int64)[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    if SUMS == 2:
        products = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        mean = tl.load(mean_ptr + group * O + c, mask=c < O, other=0.0)[None, :]
        rstd = tl.load(rstd_ptr + group * O + c, mask=c < O, other=0.0)[None, :]
    for step in range(0, steps):
        cell = (slab * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        n = cell // cells_w // cells_h
        cell_h, cell_w = cell // cells_w % cells_h, cell % cells_w
        here = (n < images)[:, None] & (c < O)[None, :]
        n += group * images
        if POOL:
            whole = here & ((cell_h < H // 2) & (cell_w < W // 2))[:, None]
            largest = tl.full([BLOCK_P, BLOCK_C], float("-inf"), tl.float32)
            place = tl.zeros([BLOCK_P, BLOCK_C], tl.int32)
            for k in tl.static_range(4):
                pixel = (n * H + 2 * cell_h + k // 2) * W + 2 * cell_w + k % 2
                y = tl.load(y_ptr + pixel[:, None] * O + c[None, :], mask=whole, other=0.0).to(tl.float32)
                better = (y > largest) | (y != y)
                largest = tl.where(better, y, largest)
                place = tl.where(better, k, place)
            offset = n * stride_pn + cell_h * stride_ph + cell_w * stride_pw
            grad_pooled = tl.load(
                grad_pooled_ptr + offset[:, None] + channels * stride_pc, mask=whole, other=0.0
            ).to(tl.float32)  # fmt: skip
        for k in tl.static_range(4):
            h, w = 2 * cell_h + k // 2, 2 * cell_w + k % 2
            mask = here & ((h < H) & (w < W))[:, None]
            offset = n * stride_gn + h * stride_gh + w * stride_gw
            g = tl.load(grad_ptr + offset[:, None] + channels * stride_gc, mask=mask, other=0.0).to(tl.float32)
            pixel = ((n * H + h) * W + w)[:, None] * O + c[None, :]
            if POOL:
                g += tl.where(place == k, grad_pooled, 0.0)
            if SLOPE != 1.0:
                y = tl.load(y_ptr + pixel, mask=mask, other=0.0).to(tl.float32)
                # As torch has it where y is NaN: a ReLU lets the gradient pass, a leaky one scales it.
                g = tl.where(y <= 0, 0.0, g) if SLOPE == 0.0 else tl.where(y > 0, g, g * SLOPE)
            tl.store(g_ptr + pixel, g.to(g_ptr.dtype.element_ty), mask=mask)
            total += g
            if SUMS == 2:
                products += g * ((tl.load(x_ptr + pixel, mask=mask, other=0.0).to(tl.float32) - mean) * rstd)
    if SUMS > 0:
        tl.store(sums_ptr + (slab * SUMS * G + group) * O + c, tl.sum(total, 0), mask=c < O)
    if SUMS == 2:
        tl.store(sums_ptr + ((slab * SUMS + 1) * G + group) * O + c, tl.sum(products, 0), mask=c < O)


@without_graph
def activation_bwd(
    grad: Tensor,
    grad_pooled: Tensor | None,
    y: Tensor,
    *,
    slope: float,
    bias: bool,
    config: PointwiseConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel.

    Args:
        grad_pooled: gradient of the 2x2 max-pool of y, if there was one.
        slope: of the activation, as in :func:`conv_fwd`.
        bias: whether the bias gradient is wanted.

    Returns:
        g (N, O, H, W), channels_last; grad_bias (O,) or None.
    """
    g, sums = _launch(grad, grad_pooled, y, None, slope, 1 if bias else 0, config)
    return g, None if sums is None else reduce_slabs(sums, y.dtype)


@without_graph
def activation_norm_bwd(
    grad: Tensor, grad_pooled: Tensor | None, y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *, slope: float
) -> tuple[Tensor, Tensor]:
    """As :func:`activation_bwd`, behind a norm of ``x``, channels_last, with those statistics, (C,) or (N, C).

    Returns:
        g; (2, C) or (2, N, C) float32, the sums of g and of g (x - mean) rstd over what shares statistics.
    """
    g, sums = _launch(grad, grad_pooled, y, (x, mean, rstd), slope, 2, None)
    assert sums is not None
    return g, reduce_slabs(sums, torch.float32).view(2, *mean.shape)


def _launch(
    grad: Tensor,
    grad_pooled: Tensor | None,
    y: Tensor,
    normed: tuple[Tensor, Tensor, Tensor] | None,
    slope: float,
    wanted: int,
    config: PointwiseConfig | None,
) -> tuple[Tensor, Tensor | None]:
    """g, and of each slab so many sums, (slabs, wanted * groups * O)."""
    n, o, h, w = y.shape
    g = empty_channels_last(y, o, h, w)
    y = y.contiguous(memory_format=torch.channels_last)
    config = config or cell_config(o)
    x, mean, rstd = normed or (None, None, None)
    groups = 1 if mean is None or mean.dim() == 1 else n
    if y.numel() == 0:
        return g, y.new_zeros((1, wanted * groups * o), dtype=torch.float32) if wanted else None
    images, blocks = n // groups, triton.cdiv(o, config.block_c)
    cells = images * triton.cdiv(h, 2) * triton.cdiv(w, 2)
    count, steps = slabs(triton.cdiv(cells, config.block_p), blocks * groups)
    sums = torch.empty((count, wanted * groups * o), dtype=torch.float32, device=y.device) if wanted else None
    launch(
        _activation_bwd_kernel, (count * groups * blocks,),
        grad, grad_pooled, y, x, mean, rstd, g, sums, groups, images, h, w, o, steps,
        *grad.stride(), *(grad if grad_pooled is None else grad_pooled).stride(),
        SLOPE=slope, POOL=grad_pooled is not None, SUMS=wanted, **config.options(),
    )  # fmt: skip
    return g, sums
