"""The machine sees what is taken from a compiled kernel, on every order of events."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from fastunet.kernels import hopper
from fastunet.kernels.hopper import conv3x3

from ..conftest import CUDA
from ..hopper.conftest import config_of
from .launches import machine
from .memory import Fault

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(CUDA, reason="the machine stands in for a GPU"),
    pytest.mark.usefixtures("poisoned"),
]

# By what is missing: a pattern, what is put in its place, and what must be said of it.
MUTANTS = {
    "fence-before-a-tma-store": (r"fence\.proxy\.async\.shared::cta;", "", "race: .* reads what .* writes"),
    "barrier-before-a-tma-store": (
        r"(fence\.proxy\.async\.shared::cta;\s*)bar\.sync\s+\d, 128;",
        r"\1",
        "race|nobody wrote|more arrivals",
    ),
    "wait-for-the-last-product": (r"wgmma\.wait_group\.sync\.aligned\s+0;", "", "registers are touched|race"),
    "wait-for-the-product-before": (
        r"wgmma\.wait_group\.sync\.aligned\s+1;",
        "wgmma.wait_group.sync.aligned 2;",
        "race: .* writes what .* reads",
    ),
    "wait-for-a-tma-store": (
        r"cp\.async\.bulk\.wait_group\.read\s+0;",
        "",
        "race: .* writes what .* reads|nobody waited for",
    ),
    "wait-for-the-last-tma-store": (
        r"cp\.async\.bulk\.wait_group\.read\s+0;(\s*(?:bar\.sync\s+\d, 128;\s*)?barrier\.sync)",
        r"\1",
        "nobody waited for",
    ),
    "wgmma-fence": (r"wgmma\.fence\.sync\.aligned;", "", "after the last wgmma.fence"),
    "wait-for-the-launch-before": (r"griddepcontrol\.wait\s*;", "", "before griddepcontrol.wait"),
    "expected-bytes": (r"(expect_tx\.\S+\s+_, \[%r\d+\], \d+)", r"\g<1>0", "deadlock"),
    "arrivals": (r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", "", "deadlock"),
    "wait-for-data": (
        r"mbarrier\.try_wait\.parity\.(\S+) complete, \[(%r\d+)\], %r\d+;",
        r"mov.pred complete, -1;",
        "race|nobody wrote|more arrivals",
    ),
}


@pytest.fixture
def layer(seed, monkeypatch):
    """A convolution with its pool, of several tiles a program, in a small configuration; and its launch."""
    monkeypatch.setattr(conv3x3, "multiprocessors", lambda device: 1)
    x, weight = torch.randn(1, 128, 9, 17).half(), (torch.randn(64, 128, 3, 3) / 34).half()
    config = config_of(64, (1, 4, 8), conv3x3.OVERLAPPING_WINDOWS, 2, 3)
    return x, weight, lambda: hopper.conv_pool_fwd(x, weight, None, slope=0.0, config=config)


def test_without_a_mutation(layer, seed):
    x, weight, launch = layer
    for order in range(3):
        with machine(seed + order) as launched:
            y, pooled = launch()
        truth = F.conv2d(x.double(), weight.double(), padding=1).relu()
        assert (y - truth).abs().max() < 2**-10 * truth.max() and torch.equal(pooled, F.max_pool2d(y, 2))
        assert [launch.name for launch in launched] == ["_conv_fwd_kernel"]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_found(mutant, layer, seed):
    pattern, replacement, said = MUTANTS[mutant]
    *_, launch = layer

    def mutated(ptx: str) -> str:
        code = re.sub(r"//[^\n]*|^\s*\.loc[^\n]*$", "", ptx, flags=re.MULTILINE)
        changed, count = re.subn(pattern, replacement, code)
        assert count, f"no {pattern} in the kernel"
        return changed

    for order in range(3):
        with machine(seed + order, mutated), pytest.raises(Fault, match=said):
            launch()
