"""Parity: one rule, used by the tests of the kernels and by whoever checks a model.

Three results of one computation are compared: the **truth** (the reference in float64), the
**baseline** (the reference in the working dtype: what a user has today) and the **candidate**.
"""

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
    tf32: bool = False,
    stages: int = 1,
) -> Parity:
    """Whether ``candidate`` is as close to the truth as the baseline is.

    The rule (after the tests of apple/ml-cross-entropy): the candidate's largest error may not
    exceed the baseline's plus a floor of ``eps * max |truth|`` for 16-bit dtypes, four times that
    for float32 (the derivation stands beside ``_FLOOR_ROUNDINGS``). NaN and infinities must stand
    where the baseline has them.

    Args:
        candidate, baseline: of one shape and dtype. truth: float64, of the same shape.
        tf32: float32 operands were rounded to tf32, so its eps counts.
        stages: how many fused operators, one after another, lead to this tensor. Each rounds its
            result anew; independent roundings add as their squares do, so the floor is that of one
            times ``sqrt(stages)``.

    Raises:
        ValueError: shapes or dtypes that cannot be compared.
    """
    if not candidate.shape == baseline.shape == truth.shape:
        raise ValueError(
            f"shapes: expected one, got {tuple(candidate.shape)}, {tuple(baseline.shape)}, {tuple(truth.shape)}"
        )
    if candidate.dtype != baseline.dtype or truth.dtype != torch.float64:
        raise ValueError(
            f"dtypes: expected candidate and baseline alike and a float64 truth, "
            f"got {candidate.dtype}, {baseline.dtype}, {truth.dtype}"
        )
    dtype = candidate.dtype
    candidate, baseline, truth = candidate.double(), baseline.double().to(candidate.device), truth.to(candidate.device)
    finite = baseline.isfinite() & truth.isfinite()
    # One number for each kind of element: finite, NaN, and the two infinities.
    kind, other = (torch.where(t.isfinite(), 2.0, t).nan_to_num(0.0, 1.0, -1.0) for t in (candidate, baseline))
    same_nonfinite = torch.equal(kind, other)
    if not finite.any():
        return Parity(same_nonfinite, 0.0, 0.0, 0.0, "no finite element")
    ours, theirs, largest = (
        t[finite].abs().nan_to_num(torch.inf).max().item() for t in (candidate - truth, baseline - truth, truth)
    )
    eps = TF32_EPS if tf32 else torch.finfo(dtype).eps
    floor = _FLOOR_ROUNDINGS[dtype] * stages**0.5 * eps * largest
    limit = theirs + floor
    if not same_nonfinite:
        return Parity(False, ours, theirs, limit, "NaN or infinity at other places than the baseline's")
    return Parity(ours <= limit, ours, theirs, limit, f"baseline's error plus a floor of {floor:.1e}")
