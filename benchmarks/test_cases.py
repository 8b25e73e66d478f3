"""Every case and provider through pytest-benchmark.

    python -m pytest benchmarks -k "infer and small" --benchmark-json out.json

Groups are cases. An output that breaks the parity rule fails and is not timed; a provider that a
case does not have is not collected. For rounds interleaved between providers, graphs and rows:
``fastunet bench``.
"""

from __future__ import annotations

import pytest
import torch

from .bench import baseline_of, check, truth_of
from .cases import Case, cases
from .providers import PROVIDERS, Provider, make_work, settings

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
    with settings(case.dtype):
        work = make_work(case, torch.device(DEVICE), seed=0)
        call = provider.prepare(work)
        parity = check(call(), baseline_of(work), truth_of(work), case)
        assert parity.ok, str(parity)

        def finished() -> None:
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.extra_info.update(
            threads=torch.get_num_threads(), torch=torch.__version__, error=parity.candidate_error
        )
        benchmark(finished)
