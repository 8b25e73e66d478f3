"""What the tests of ``fastunet.verify`` share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture
def x(seed: int) -> Tensor:
    return torch.randn(2, 2, 19, 22)
