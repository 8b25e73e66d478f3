"""Every operator in turn."""

from __future__ import annotations

import pytest

from .cases import CASES


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def stages(request):
    """How many operations of the rule's the operator is."""
    return 2 if "head" in request.node.callspec.params["case"] else 1
