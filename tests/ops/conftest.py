"""Every operator in turn."""

from __future__ import annotations

import pytest

from .cases import CASES


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]
