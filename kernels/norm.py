"""Batch norm and instance norm with activation and 2x2 max-pool, and their gradients.

    xhat[n, c, h, w] = (x[n, c, h, w] - mean[k, c]) rstd[k, c],   rstd = 1 / sqrt(var + eps)
    y                = act(gamma xhat + beta),   pooled = 2x2 max of y
    grad_beta        = sum over n, h, w of g,   grad_gamma = sum of g xhat
    grad_x           = gamma rstd (g - (sum of g + xhat sum of g xhat, both of k alone) / pixels of k)
                     = gamma rstd g, by fixed statistics

k is the group of images that share statistics: there is one of a batch norm, and each image is one of an instance
norm. g is the gradient before the activation, from the pass that undoes it (activation_bwd.py), which takes both
sums too. Ioffe & Szegedy (2015, arXiv:1502.03167); Ulyanov, Vedaldi & Lempitsky (2016, arXiv:1607.08022).

Statistics: each lane keeps the mean and the squared deviations of its pixels (Welford 1962), each program merges
its lanes' and a second launch the programs', always in the same order (Chan, Golub & LeVeque 1979); nothing
cancels, however far the mean is from 0.

Tiling: one program takes BLOCK_P pixels of a group, or 2x2 cells of them, x BLOCK_C channels; for statistics a slab
of such steps. Consecutive slabs are of consecutive groups, so that a sum over slabs sums no groups. Shapes: x
(N, C, H, W), float16, bfloat16 or float32; gamma, beta (C,) of any of them; y and grad_x as x, channels_last;
statistics (C,), or (N, C) of images, and sums in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation_bwd import activation_norm_bwd
from .implicit_gemm import activate
from .launch import launch
from .tensors import bias_or_zeros, empty_channels_last, without_graph
from .tuning import FUSION, REDUCTION_PROGRAMS, cell_config, power_of_2, slabs

Statistics = tuple[Tensor, Tensor, Tensor]  # mean, rstd, unbiased variance
Moments = tuple[Tensor, Tensor, Tensor, Tensor]  # a map and its statistics


@triton.jit
def _moments_kernel(x_ptr, partial_ptr, G, pixels, C, steps, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of each slab: how many pixels, their mean and their squared deviations, [3, G, C]."""
    blocks = tl.cdiv(C, BLOCK_C)
    slab = (tl.program_id(0) // blocks).to(tl.int64)
    group, slab = slab % G, slab // G
    x_ptr += group * pixels * C
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = tl.zeros([BLOCK_P], tl.float32)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for step in range(0, steps):
        pixel = (slab * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        here = pixel < pixels
        mask = here[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + pixel[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        count += here.to(tl.float32)
        apart = x - mean
        mean += tl.where(mask, apart / tl.maximum(count, 1.0)[:, None], 0.0)
        squares += tl.where(mask, apart * (x - mean), 0.0)
    total = tl.sum(count, 0)
    center = tl.sum(count[:, None] * mean, 0) / tl.maximum(total, 1.0)
    apart = mean - center[None, :]
    row = partial_ptr + (slab * 3 * G + group) * C + c
    tl.store(row, tl.full([BLOCK_C], 0.0, tl.float32) + total, mask=c < C)
    tl.store(row + G * C, center, mask=c < C)
    tl.store(row + 2 * G * C, tl.sum(squares + count[:, None] * apart * apart, 0), mask=c < C)


@triton.jit
def _merge_moments_kernel(
    partial_ptr, mean_ptr, rstd_ptr, variance_ptr, S, C, eps, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """[S, 3, C] of the slabs -> mean, rstd and unbiased variance, [C]; C are the channels of all groups."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    counts = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    means = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        mask = (s < S)[:, None] & (c < C)[None, :]
        row = partial_ptr + s.to(tl.int64)[:, None] * 3 * C + c[None, :]
        count = tl.load(row, mask=mask, other=0.0)
        counts += count
        means += count * tl.load(row + C, mask=mask, other=0.0)
    total = tl.sum(counts, 0)
    center = tl.sum(means, 0) / tl.maximum(total, 1.0)
    squares = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        mask = (s < S)[:, None] & (c < C)[None, :]
        row = partial_ptr + s.to(tl.int64)[:, None] * 3 * C + c[None, :]
        apart = tl.load(row + C, mask=mask, other=0.0) - center[None, :]
        squares += tl.load(row + 2 * C, mask=mask, other=0.0) + tl.load(row, mask=mask, other=0.0) * apart * apart
    deviation = tl.sum(squares, 0)
    tl.store(mean_ptr + c, center, mask=c < C)
    tl.store(rstd_ptr + c, 1.0 / tl.sqrt(deviation / tl.maximum(total, 1.0) + eps), mask=c < C)
    tl.store(variance_ptr + c, deviation / tl.maximum(total - 1.0, 1.0), mask=c < C)


@triton.jit
def _condense_moments_kernel(partial_ptr, condensed_ptr, S, C, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """[S, 3, C] of slabs -> [slabs of BLOCK_S of them, 3, C]; C are the channels of all groups."""
    slab = tl.program_id(0).to(tl.int64)
    s = slab * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (s < S)[:, None] & (c < C)[None, :]
    row = partial_ptr + s[:, None] * 3 * C + c[None, :]
    count = tl.load(row, mask=mask, other=0.0)
    mean = tl.load(row + C, mask=mask, other=0.0)
    total = tl.sum(count, 0)
    center = tl.sum(count * mean, 0) / tl.maximum(total, 1.0)
    apart = mean - center[None, :]
    squares = tl.load(row + 2 * C, mask=mask, other=0.0) + count * apart * apart
    row = condensed_ptr + slab * 3 * C + c
    tl.store(row, total, mask=c < C)
    tl.store(row + C, center, mask=c < C)
    tl.store(row + 2 * C, tl.sum(squares, 0), mask=c < C)


@triton.jit
def _norm_fwd_kernel(
    x_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, y_ptr, pooled_ptr,
    G, images, H, W, C,
    SLOPE: tl.constexpr, POOL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    slab = (tl.program_id(0) // blocks).to(tl.int64)
    group = slab % G
    cell = slab // G * BLOCK_P + tl.arange(0, BLOCK_P)
    cells_h, cells_w = tl.cdiv(H, 2), tl.cdiv(W, 2)
    n = cell // cells_w // cells_h
    cell_h, cell_w = cell // cells_w % cells_h, cell % cells_w
    here = (n < images)[:, None] & (c < C)[None, :]
    n += group * images
    mean = tl.load(mean_ptr + group * C + c, mask=c < C, other=0.0)[None, :]
    rstd = tl.load(rstd_ptr + group * C + c, mask=c < C, other=0.0)[None, :]
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    largest = tl.full([BLOCK_P, BLOCK_C], float("-inf"), tl.float32)
    for k in tl.static_range(4):
        h, w = 2 * cell_h + k // 2, 2 * cell_w + k % 2
        mask = here & ((h < H) & (w < W))[:, None]
        offset = ((n * H + h) * W + w)[:, None] * C + c[None, :]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        y = activate((x - mean) * rstd * gamma + beta, SLOPE).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offset, y, mask=mask)
        if POOL:
            rounded = y.to(tl.float32)
            largest = tl.where((rounded > largest) | (rounded != rounded), rounded, largest)
    if POOL:
        whole = here & ((cell_h < H // 2) & (cell_w < W // 2))[:, None]
        offset = ((n * (H // 2) + cell_h) * (W // 2) + cell_w)[:, None] * C + c[None, :]
        tl.store(pooled_ptr + offset, largest.to(pooled_ptr.dtype.element_ty), mask=whole)


@triton.jit
def _norm_bwd_kernel(
    g_ptr, x_ptr, mean_ptr, rstd_ptr, gamma_ptr, sums_ptr,
    G, pixels, C, FIXED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """In place: g becomes grad_x."""
    blocks = tl.cdiv(C, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    slab = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = slab // G * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (pixel < pixels)[:, None] & (c < C)[None, :]
    offset = (slab % G * pixels + pixel)[:, None] * C + c[None, :]
    of_group = slab % G * C + c
    rstd = tl.load(rstd_ptr + of_group, mask=c < C, other=0.0)[None, :]
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    g = tl.load(g_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if not FIXED:
        mean = tl.load(mean_ptr + of_group, mask=c < C, other=0.0)[None, :]
        of_beta = tl.load(sums_ptr + of_group, mask=c < C, other=0.0)[None, :]
        of_gamma = tl.load(sums_ptr + G * C + of_group, mask=c < C, other=0.0)[None, :]
        xhat = (tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        g -= (of_beta + xhat * of_gamma) / pixels
    tl.store(g_ptr + offset, (gamma * rstd * g).to(g_ptr.dtype.element_ty), mask=mask)


@without_graph
def norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fixed: tuple[Tensor, Tensor] | None = None,
    *,
    eps: float,
    slope: float,
    pool: bool,
    per_image: bool = False,
    taken: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Launch the kernels.

    Args:
        weight, bias: gamma and beta; None for 1 and 0.
        fixed: mean and variance (C,) to take in place of x's own.
        slope: of the activation, as in :func:`conv_fwd`.
        per_image: whether each image has statistics of its own.
        taken: of :func:`statistics`, if they were.

    Returns:
        y; its max-pool (N, C, H // 2, W // 2) or None; of x the mean, rstd and unbiased variance, or the fixed ones.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    y, pooled = empty_channels_last(x, c, h, w), empty_channels_last(x, c, h // 2, w // 2) if pool else None
    if fixed is not None:
        mean, variance = (t.to(torch.float32) for t in fixed)
        rstd = torch.rsqrt(variance + eps)
    else:
        mean, rstd, variance = taken or statistics(x, eps, per_image)
    if x.numel():
        config, groups = cell_config(c), n if per_image else 1
        images, blocks = n // groups, triton.cdiv(c, config.block_c)
        cells = images * triton.cdiv(h, 2) * triton.cdiv(w, 2)
        gamma, beta = x.new_ones(c) if weight is None else weight.contiguous(), bias_or_zeros(bias, c, x)
        launch(
            _norm_fwd_kernel, (triton.cdiv(cells, config.block_p) * groups * blocks,),
            x, mean, rstd, gamma, beta, y, pooled, groups, images, h, w, c,
            SLOPE=slope, POOL=pool, **config.options(),
        )  # fmt: skip
    return y, pooled, mean, rstd, variance


def statistics(x: Tensor, eps: float, per_image: bool) -> Statistics:
    """Mean, rstd and unbiased variance of x, channels_last: (C,), or (N, C) of each image; NaN of nothing."""
    n, c, h, w = x.shape
    if x.numel() == 0:
        of_what = (n, c) if per_image else (c,)
        mean, rstd, variance = (torch.full(of_what, torch.nan, device=x.device) for _ in range(3))
        return mean, rstd, variance
    config, groups = cell_config(c), n if per_image else 1
    pixels, blocks = n // groups * h * w, triton.cdiv(c, config.block_c)
    # Of a group, however many there are: an image's statistics do not depend on who is in its batch.
    count, steps = slabs(triton.cdiv(pixels, config.block_p), blocks)
    partial = torch.empty((count, 3, groups, c), dtype=torch.float32, device=x.device)
    launch(_moments_kernel, (count * groups * blocks,), x, partial, groups, pixels, c, steps, **config.options())
    return merged_statistics(partial, eps, per_image)


def merged_statistics(partial: Tensor, eps: float, per_image: bool) -> Statistics:
    """As :func:`statistics`, from count, mean and squared deviations of slabs: (S, 3, groups, C), float32."""
    count, _, groups, c = partial.shape
    # Of 2,048 elements and odd channels the compiler of Triton 3.9.0 crashes.
    tile, merged = {"BLOCK_C": 16, "num_warps": 4, **FUSION}, groups * c
    while count > REDUCTION_PROGRAMS:  # tiles of a large map: one program would read them one after another
        fewer = triton.cdiv(count, 64)
        condensed = partial.new_empty((fewer, *partial.shape[1:]))
        grid = fewer, triton.cdiv(merged, 16)
        launch(_condense_moments_kernel, grid, partial, condensed, count, merged, BLOCK_S=64, **tile)
        partial, count = condensed, fewer
    of_what = (groups, c) if per_image else (c,)
    mean, rstd, variance = (partial.new_empty(of_what) for _ in range(3))
    grid, block_s = (triton.cdiv(merged, 16),), power_of_2(count, 1, 64)
    launch(_merge_moments_kernel, grid, partial, mean, rstd, variance, count, merged, eps, BLOCK_S=block_s, **tile)
    return mean, rstd, variance


@without_graph
def norm_bwd(
    grad: Tensor,
    grad_pooled: Tensor | None,
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    slope: float,
    fixed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels.

    Args:
        grad_pooled: gradient of the max-pool of y, if there was one.
        x, y, weight, mean, rstd, slope: of :func:`norm_fwd`. fixed: whether the statistics were given to it.

    Returns:
        grad_x (N, C, H, W), channels_last; grad_beta and grad_gamma, (2, C) float32.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    g, sums = activation_norm_bwd(grad, grad_pooled, y, x, mean, rstd, slope=slope)
    if x.numel():
        config, groups = cell_config(c), mean.numel() // c
        pixels = n // groups * h * w
        grid = (triton.cdiv(pixels, config.block_p) * groups * triton.cdiv(c, config.block_c),)
        launch(
            _norm_bwd_kernel, grid,
            g, x, mean, rstd, x.new_ones(c) if weight is None else weight.contiguous(), sums, groups, pixels, c,
            FIXED=fixed, **config.options(),
        )  # fmt: skip
    return g, sums if mean.dim() == 1 else sums.sum(1)
