"""The parity rule itself."""

from __future__ import annotations

import pytest
import torch

from fastunet.parity import compare
from fastunet.parity.rule import TF32_EPS, truncating_stages

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture
def truth(seed):
    return torch.randn(4, 5, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_baseline_passes_against_itself(dtype, truth):
    baseline = truth.to(dtype)
    parity = compare(baseline, baseline, truth)
    assert parity.ok and parity.candidate_error == parity.baseline_error < parity.limit
    assert str(parity).startswith("parity: ")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_limit_is_the_baselines_error_plus_the_floor(dtype, truth):
    numbers = torch.finfo(dtype)
    floor = {torch.float32: 4.0}.get(dtype, 1.0) * numbers.eps * (truth.abs().max().item() + numbers.smallest_normal)
    baseline = truth.to(dtype)
    parity = compare(baseline, baseline, truth)
    assert parity.limit == pytest.approx((baseline.double() - truth).abs().max().item() + floor)
    wrong = baseline.clone()
    wrong[2, 3] += 4 * parity.limit
    assert not compare(wrong, baseline, truth).ok


def test_an_interpreter_that_truncates_is_allowed_for(seed):
    """Errors of one layer behind another that all go towards 0 add up as they are."""

    def truncated(x):
        return (x.float().view(torch.int32) & -65536).view(torch.float32).bfloat16()

    truth, layers = 1 + torch.rand(64, 64, dtype=torch.float64), 4
    candidate, baseline = truncated(truth), truth.bfloat16()
    for _ in range(layers - 1):
        truth, candidate, baseline = 1.1 * truth, truncated(1.1 * candidate.double()), 1.1 * baseline
    assert not compare(candidate, baseline, truth, stages=layers).ok
    assert compare(candidate, baseline, truth, stages=truncating_stages(layers, torch.bfloat16, True)).ok
    assert truncating_stages(layers, torch.bfloat16, False) == truncating_stages(layers, torch.float16, True) == layers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_error_everywhere_shows_in_the_root_mean_square(dtype, seed):
    """Each element within the limit, all of them off: a result scaled by a few eps."""
    truth = torch.rand(10_000, dtype=torch.float64) / 2 + 1
    eps = torch.finfo(dtype).eps
    baseline = truth.to(dtype)
    floor = {torch.float32: 4.0}.get(dtype, 1.0)
    assert compare((truth + 0.1 * floor * eps).to(dtype), baseline, truth).ok
    scaled = compare((truth * (1 + 0.9 * floor * eps)).to(dtype), baseline, truth)
    assert not scaled.ok and scaled.candidate_error <= scaled.limit
    assert scaled.reason.startswith("root-mean-square error")


def test_zeros_average_nothing():
    """Of a single element alive after a ReLU the largest error is the whole one."""
    truth = torch.zeros(10_000, dtype=torch.float64)
    truth[17] = 1
    baseline, eps = truth.float(), torch.finfo(torch.float32).eps
    assert compare((truth * (1 + 3 * eps)).float(), baseline, truth).ok
    assert not compare((truth * (1 + 5 * eps)).float(), baseline, truth).ok


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_a_gradient_small_elements_count(dtype, seed):
    """Whose errors do not grow with its values: off by half the floor in every element is a fault."""
    eps = torch.finfo(dtype).eps
    truth = torch.full((10_000,), 1e-2, dtype=torch.float64)
    truth[0] = 1
    off = (truth + {torch.float32: 2.0}.get(dtype, 0.5) * eps).to(dtype)
    parity = compare(off, truth.to(dtype), truth, baseline_truth=truth)
    assert not parity.ok and parity.candidate_error <= parity.limit


def test_tf32_has_its_own_floor(truth):
    baseline = truth.float()
    off = baseline + TF32_EPS / 2 * truth.abs().max().float()
    assert not compare(off, baseline, truth).ok
    assert compare(off, baseline, truth, tf32=True).ok


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_must_stand_in_the_same_places(value, truth):
    baseline = truth.float()
    candidate = baseline.clone()
    candidate[0, 0] = value
    assert not compare(candidate, baseline, truth).ok
    both = candidate.clone()
    assert compare(candidate, both, truth).ok
    other = baseline.clone()
    other[0, 0] = torch.inf if value != torch.inf else torch.nan
    assert not compare(candidate, other, truth).ok
    assert not compare(baseline, candidate, truth).ok


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_a_rounding_overflows_either_may_be_infinite(dtype):
    largest = torch.finfo(dtype).max
    truth = torch.tensor([1.0, largest * (1 - torch.finfo(dtype).eps / 8)], dtype=torch.float64)
    finite, infinite = torch.tensor([1.0, largest], dtype=dtype), torch.tensor([1.0, torch.inf], dtype=dtype)
    assert compare(finite, infinite, truth).ok and compare(infinite, finite, truth).ok
    assert not compare(infinite, finite, truth / 2).ok
    assert not compare(torch.tensor([1.0, torch.nan], dtype=dtype), finite, truth).ok


@pytest.mark.parametrize("candidate, truth", [([1.0, -5e4], 65519.0), ([1.0, 0.0], 7e4), ([0.0], 1e6)], ids=str)
def test_where_the_baseline_overflows_the_candidate_is_compared_still(candidate, truth):
    found, exact = torch.tensor(candidate).half(), torch.tensor([*candidate[:-1], truth], dtype=torch.float64)
    assert not compare(found, exact.half(), exact).ok
    assert compare(exact.half(), exact.half(), exact).ok


def test_numbers_below_the_smallest_may_differ_by_a_step():
    step = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    truth = torch.tensor([1.4 * step], dtype=torch.float64)
    baseline = truth.half()
    assert compare(baseline + step, baseline, truth).ok
    assert not compare(baseline + 4 * step, baseline, truth).ok


def test_cancelling_terms_and_the_baselines_own_truth_count(truth):
    baseline = truth.half()
    off = baseline + 8 * torch.finfo(torch.float16).eps
    assert not compare(off, baseline, truth).ok
    assert compare(off, baseline, truth, terms=100.0).ok
    elsewhere = truth + 1
    assert compare(baseline, elsewhere.half(), truth, baseline_truth=elsewhere).limit < 0.01


def test_what_cannot_be_compared_is_refused(truth):
    with pytest.raises(ValueError, match="shapes"):
        compare(truth.float()[:1], truth.float(), truth)
    with pytest.raises(ValueError, match="dtypes"):
        compare(truth.half(), truth.float(), truth)
    with pytest.raises(ValueError, match="dtypes"):
        compare(truth.float(), truth.float(), truth.float())
