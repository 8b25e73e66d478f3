"""What the tests of ``fastunet.verify`` share."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def no_search_for_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter looks for one in every sum of indices, for a third of its time: for that, tests/kernels do."""
    if not torch.cuda.is_available():
        from triton.runtime.interpreter import interpreter_builder

        options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter_builder, "options", options)


@pytest.fixture
def x(seed: int) -> Tensor:
    return torch.randn(2, 2, 19, 22)
