"""Every case and provider through pytest-benchmark.

    python -m pytest benchmarks -k "infer and small" --benchmark-json out.json

Groups are cases. An output that breaks the parity rule fails and is not timed; a provider that a
case does not have is not collected. For rounds interleaved between providers, graphs and rows:
``fastunet bench``.
"""

from __future__ import annotations

import pytest
import torch

from .cases import Case, cases
from .measure import baseline_of, check, first_call, truth_of
from .providers import PROVIDERS, Provider, settings
from .work import make_work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pairs() -> list:
    return [
        pytest.param(case, provider, id=f"{case.name}-{provider.name}", marks=pytest.mark.benchmark(group=case.name))
        for case in cases(DEVICE)
        for provider in PROVIDERS
        if provider.serves(case, DEVICE)
    ]


@pytest.mark.parametrize("case, provider", pairs())
def test_case(case: Case, provider: Provider, benchmark) -> None:
    torch._dynamo.reset()  # compiled code has a limited number of versions
    with settings(case.dtype):
        work = make_work(case, torch.device(DEVICE), seed=0)
        baseline = baseline_of(work)
        call, results = first_call(provider, work)
        parity = check(results, baseline, truth_of(work), case)
        assert parity.ok, str(parity)

        def finished() -> None:
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.extra_info.update(
            threads=torch.get_num_threads(), torch=torch.__version__, error=parity.candidate_error
        )
        benchmark(finished)
