"""The rule: a candidate's error may not exceed the baseline's by more than a few roundings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TF32_EPS = 2.0**-10  # tf32 keeps 10 bits of mantissa, as float16 does

# Roundings, in units of the dtype's eps at the largest value, that a correct candidate may have and
# a lucky baseline not. 16-bit: the stored result is off by eps / 2, and so is one intermediate map
# that both must round. float32 and tf32: products are summed in another order; over K terms of
# random sign the difference grows as sqrt(K) eps / 2, which for the K = 9 * 1536 of the widest layer,
# at a typical term of a sixteenth of the largest sum, is 4.
_FLOOR_ROUNDINGS = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 4.0, torch.float64: 4.0}


# A maximum is one element; an error in all of them shows in the root mean square. A correct candidate
# that rounds once where the baseline rounds twice, or the reverse, differs by sqrt(2); twice is the limit.
# Luck averages out over n elements: as 1 / sqrt(n) where they are independent, but neighbours share
# their inputs, so the floor is divided by n**(1/4).
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
    exceed the baseline's plus a floor of ``eps * max |truth|`` for 16-bit dtypes, four times that
    for float32 (the derivation stands beside ``_FLOOR_ROUNDINGS``), and never less than one step
    of the dtype's smallest numbers. Nor may its root-mean-square error exceed twice the baseline's
    plus that floor over ``n ** (1/4)``, for n elements. NaN and infinities must stand where the
    baseline has them, but for elements so near the dtype's largest number that an error within the
    limit overflows.

    Args:
        candidate, baseline: of one shape and dtype. truth: float64, of the same shape.
        baseline_truth: the baseline's own truth, where it is not the candidate's: gradients, whose
            truth depends on which side of a ReLU each network took.
        tf32: float32 operands were rounded to tf32, so its eps counts.
        stages: how many fused operators, one after another, lead to this tensor. Each rounds its
            result anew; independent roundings add as their squares do, so the floor is that of one
            times ``sqrt(stages)``.
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
    finite = candidate.isfinite() & baseline.isfinite() & truth.isfinite()
    ours, theirs, largest = (
        t[finite].abs().max().item() if finite.any() else 0.0
        for t in (candidate - truth, baseline - theirs_truth, truth)
    )
    eps = TF32_EPS if tf32 else numbers.eps
    smallest = numbers.smallest_normal * numbers.eps
    roundings = _FLOOR_ROUNDINGS[dtype] * stages**0.5
    size = max(largest, terms)
    summed = 0.5 * summands**0.5 * min(eps, torch.finfo(torch.float32).eps) if summands > 1 else 0.0
    floor = roundings * (eps * size + smallest) + summed * size
    limit = theirs + floor
    # One number for each kind of element: finite, NaN, and the two infinities.
    kind, other = (torch.where(t.isfinite(), 2.0, t).nan_to_num(0.0, 1.0, -1.0) for t in (candidate, baseline))

    def may_be(result: Tensor, exact: Tensor) -> Tensor:
        reach = exact.abs() * (1 + roundings * eps) + min(limit, numbers.max / 16)
        overflows = exact.isfinite() & (reach >= numbers.max)
        return result.isfinite() | (overflows & (result == exact.sign() * torch.inf))

    if ((kind != other) & ~(may_be(candidate, truth) & may_be(baseline, theirs_truth))).any():
        return Parity(False, ours, theirs, limit, "NaN or infinity at other places than the baseline's")
    if not finite.any():
        return Parity(True, 0.0, 0.0, 0.0, "no finite element")
    rms, their_rms = (t[finite].square().mean().sqrt().item() for t in (candidate - truth, baseline - theirs_truth))
    rms_limit = _RMS_RATIO * their_rms + floor / int(finite.sum()) ** 0.25
    if ours <= limit and rms > rms_limit:
        return Parity(False, ours, theirs, limit, f"root-mean-square error {rms:.1e}, limit {rms_limit:.1e}")
    return Parity(ours <= limit, ours, theirs, limit, f"baseline's error plus a floor of {floor:.1e}")
