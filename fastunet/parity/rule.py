"""The rule: a candidate's error may not exceed the baseline's by more than a few roundings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TF32_EPS = 2.0**-10  # tf32 keeps 10 bits of mantissa, as float16 does

# The floor and the ratio of :func:`compare`, whose docstring derives them.
_FLOOR_ROUNDINGS = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 4.0, torch.float64: 4.0}
_RMS_RATIO = 2.0


@dataclass(frozen=True)
class Parity:
    """Outcome of :func:`compare`; errors are maxima of |result - truth| over finite elements."""

    ok: bool
    candidate_error: float
    baseline_error: float
    limit: float
    reason: str

    def __str__(self) -> str:
        verdict = "parity" if self.ok else "NO parity"
        return (
            f"{verdict}: candidate error {self.candidate_error:.3e}, baseline error {self.baseline_error:.3e}, "
            f"limit {self.limit:.3e} ({self.reason})"
        )


Rule = Callable[..., Parity]  # takes what :func:`compare` takes


def compare(
    candidate: Tensor,
    baseline: Tensor,
    truth: Tensor,
    *,
    baseline_truth: Tensor | None = None,
    tf32: bool = False,
    stages: float = 1,
    terms: float = 0.0,
    summands: int = 1,
) -> Parity:
    """Whether ``candidate`` is as close to the truth as the baseline is.

    The rule (after the tests of apple/ml-cross-entropy): the candidate's largest error may not
    exceed the baseline's plus a floor, ``eps * max |truth|`` for 16-bit dtypes and four times that
    for float32, and never less than one step of the dtype's smallest numbers. Nor may its
    root-mean-square error exceed twice the baseline's plus that floor over ``n ** (1/4)``, for n
    elements that are not 0; taken at the truth's own root mean square, but for gradients. NaN and infinities must
    stand where the baseline has them, but for elements so near the dtype's largest number that an
    error within the limit overflows.

    The floor is what a correct candidate may lose to a lucky baseline, in units of ``eps`` at the
    largest value. 16-bit: the stored result is off by half of one, and so is one intermediate map
    that both must round; together 1. float32 and tf32: products are summed in another order, and
    over K terms of random sign that grows as ``sqrt(K) eps / 2``; for the K = 9 * 1536 of the
    seed's widest layer, at a typical term of a sixteenth of the largest sum, that is 4.

    A maximum is one element; an error in all of them shows in the root mean square. A candidate
    that rounds once where the baseline rounds twice, or the reverse, differs by ``sqrt(2)``; twice
    is the limit. Luck averages out over n elements: as ``1 / sqrt(n)`` where they are independent,
    but neighbours share their inputs, hence ``n ** (1/4)``. Zeros, which a ReLU leaves without any
    error, average nothing: of a map with a single element alive, that one's luck is the map's.

    Args:
        candidate, baseline: of one shape and dtype. truth: float64, of the same shape.
        baseline_truth: the baseline's own truth, where it is not the candidate's: gradients, whose
            truth depends on which side of a ReLU each network took.
        tf32: float32 operands were rounded to tf32, so its eps counts.
        stages: how many fused operators, one after another, lead to this tensor. Each rounds its
            result anew; independent roundings add as their squares do, so the floor is that of one
            times ``sqrt(stages)``. :func:`fastunet.verify` gives a gradient eight times its layers:
            the backward pass has as many again, and twice the floor of both is what runs of small
            float16 networks without a fault took (benchmarks/NOTES.md).
        terms: for a sum whose terms cancel, the root of the sum of their squares, as that is what
            their independent relative errors add up to. Counts where it exceeds ``max |truth|``.
        summands: of a gradient, the pixels it sums over. One by one in float32, as torch does on a
            CPU in channels_last, they lose up to half the root of their number in roundings.

    Raises:
        ValueError: shapes or dtypes that cannot be compared.
    """
    theirs_truth = truth if baseline_truth is None else baseline_truth
    if not candidate.shape == baseline.shape == truth.shape == theirs_truth.shape:
        raise ValueError(
            f"shapes: expected one, got {tuple(candidate.shape)}, {tuple(baseline.shape)}, {tuple(truth.shape)}"
        )
    if candidate.dtype != baseline.dtype or truth.dtype != torch.float64:
        raise ValueError(
            f"dtypes: expected candidate and baseline alike and a float64 truth, "
            f"got {candidate.dtype}, {baseline.dtype}, {truth.dtype}"
        )
    dtype = candidate.dtype
    numbers = torch.finfo(dtype)
    candidate, baseline = candidate.double(), baseline.double().to(candidate.device)
    truth, theirs_truth = truth.to(candidate.device), theirs_truth.to(candidate.device)
    eps = TF32_EPS if tf32 else numbers.eps
    smallest = numbers.smallest_normal * numbers.eps
    # Each against its own truth, wherever both are finite: what the baseline overflows says nothing of the candidate.
    off, their_off = (
        (result - exact)[result.isfinite() & exact.isfinite()]
        for result, exact in ((candidate, truth), (baseline, theirs_truth))
    )
    ours, theirs = (t.abs().max().item() if t.numel() else 0.0 for t in (off, their_off))
    inside = truth[truth.abs() <= numbers.max]
    largest = inside.abs().max().item() if inside.numel() else 0.0
    roundings = _FLOOR_ROUNDINGS[dtype] * stages**0.5
    size = max(largest, terms)
    floor = roundings * (eps * size + smallest)
    if summands > 1:
        floor += 0.5 * summands**0.5 * min(eps, torch.finfo(torch.float32).eps) * size
    limit = theirs + floor
    # One number for each kind of element: finite, NaN, and the two infinities.
    kind, other = (torch.where(t.isfinite(), 2.0, t).nan_to_num(0.0, 1.0, -1.0) for t in (candidate, baseline))

    def may_be(result: Tensor, exact: Tensor) -> Tensor:
        reach = exact.abs() * (1 + roundings * eps) + min(limit, numbers.max / 16)
        overflows = exact.isfinite() & (reach >= numbers.max)
        return result.isfinite() | (overflows & (result == exact.sign() * torch.inf))

    unlike = kind != other
    if unlike.any() and (unlike & ~(may_be(candidate, truth) & may_be(baseline, theirs_truth))).any():
        return Parity(False, ours, theirs, limit, "NaN or infinity at other places than the baseline's")
    if not off.numel():
        return Parity(True, 0.0, theirs, limit, "no finite element")
    rms, their_rms, typical = (t.square().mean().sqrt().item() if t.numel() else 0.0 for t in (off, their_off, inside))
    # At the typical value, not the largest. The elements of a gradient share the errors of what was summed before.
    share = typical / largest if largest and baseline_truth is None else 1.0
    rms_floor = share * floor + roundings * smallest
    alive = max(1, int(inside.count_nonzero()))
    rms_limit = _RMS_RATIO * their_rms + rms_floor / alive**0.25
    if ours <= limit and rms > rms_limit:
        return Parity(False, ours, theirs, limit, f"root-mean-square error {rms:.1e}, limit {rms_limit:.1e}")
    return Parity(ours <= limit, ours, theirs, limit, f"baseline's error plus a floor of {floor:.1e}")


def truncating_stages(stages: float, dtype: torch.dtype, interpreted: bool) -> float:
    """``stages`` of :func:`compare` for kernels in Triton's interpreter.

    It truncates to bfloat16 where hardware rounds: off by up to eps each time, not half of it, and
    always towards 0, so that the errors of one layer after another add up as they are and not as
    their squares. The floor is that of one layer ``stages + 1`` times.
    """
    return (stages + 1) ** 2 if interpreted and dtype == torch.bfloat16 else stages


@contextlib.contextmanager
def tf32_convolutions(allowed: bool) -> Iterator[None]:
    """Whether PyTorch's own float32 convolutions on CUDA, a baseline, round their factors to tf32 within the block."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
