"""The emulator finds what a GPU may forgive: one mutant of the kernels for each kind of error."""

from __future__ import annotations

import pytest

from fastunet.kernels import hopper

from ..kernels.conftest import make
from .block import Deadlock, Hazard, MissingFence, TooEarly
from .conftest import config_of

__all__ = ["make"]

# The smaller ring is what the producer waits for; the wait for the other decides nothing.
IN_TURNS = config_of(64, (1, 4, 8), True, 2, 3)
FEW_PIXELS = config_of(64, (1, 4, 8), True, 2, 8)
COOPERATIVE = config_of(128, (1, 4, 8), True, 2, 8)
NO_HALO = config_of(64, (2, 4, 4), False, 2, 2)

MULTIPLY, LOAD, FINISH = "multiply_tiles", "_load_step", "_store_tile"
X_FULL = "mbarrier.wait(x_full.index(stage), (step // X_STAGES) & 1)"
X_EMPTY = "mbarrier.wait(x_empty.index(stage), ((step // X_STAGES) & 1) ^ 1)"
W_EMPTY = "mbarrier.wait(w_empty.index(w_stage), ((w_step // W_STAGES) & 1) ^ 1)"
BUFFER_FREE = "tma_store_wait(0)  # the last tile's, of which ``out`` is still being read"
LAST_X = "mbarrier.arrive(x_empty.index((step + X_STAGES - 1) % X_STAGES))\n"

# Whichever comes second on this schedule is the one that is told.
READ_OR_WRITTEN = "(product|TMA load) is not ordered after a (product|TMA load)|more arrivals"

# name: (function, text, other text, error, what it says)
MUTANTS = {
    "reads-pixels-not-ready": (MULTIPLY, X_FULL, "pass", Hazard, READ_OR_WRITTEN),
    "reads-weights-not-ready": (
        MULTIPLY, "mbarrier.wait(w_full.index(w_stage), (w_step // W_STAGES) & 1)", "pass",
        Hazard, READ_OR_WRITTEN,
    ),
    "overwrites-pixels-too-early": (LOAD, X_EMPTY, "pass", Hazard, READ_OR_WRITTEN),
    "overwrites-weights-too-early": (LOAD, W_EMPTY, "pass", Hazard, READ_OR_WRITTEN),
    "frees-a-stage-being-read": (
        MULTIPLY, "num_outstanding=1", "num_outstanding=2", Hazard, READ_OR_WRITTEN,
    ),
    "stores-over-a-store": (FINISH, BUFFER_FREE, "", Hazard, "an ordinary store is not ordered after a TMA store"),
    "ends-before-its-store": (MULTIPLY, "    tma_store_wait(0)", "    pass", Hazard, "ends while its stores read"),
    "no-fence-before-the-store": (FINISH, "fence_async_shared()", "pass", MissingFence, "without a fence"),
    "wrong-phase": (MULTIPLY, X_FULL, X_FULL.replace("& 1)", "& 1 ^ 1)"), (Hazard, Deadlock), None),
    "wrong-phase-of-the-producer": (LOAD, X_EMPTY, X_EMPTY.replace(" ^ 1", ""), Deadlock, "0 multiply_tiles: parity"),
    "never-frees-a-stage": (MULTIPLY, LAST_X, "pass\n", Deadlock, "2 load_tiles: parity"),
    "expects-too-few-bytes": (
        LOAD, "x.block_type.nbytes + x_tail.block_type.nbytes", "x.block_type.nbytes", (Hazard, Deadlock), None,
    ),
    "begins-before-the-last-launch-has-ended": (
        "_conv_fwd_kernel", "    gdc_wait()", "    pass", TooEarly, "before it waited for the launch before",
    ),
    "takes-no-turns": (
        MULTIPLY, "mbarrier.wait(turns.index(CONSUMER), (turn & 1) ^ (1 - CONSUMER))", "pass", AssertionError, None,
    ),
}  # fmt: skip


@pytest.fixture
def layer(make):
    """Nine tiles over two programs of two consumers, two blocks of channels each."""
    return make("fp16", 1, 128, 12, 24), make("fp16", 64, 128, 3, 3, fan_in=1152), None


@pytest.mark.parametrize("eagerness", [0.0, 0.5], ids=["at-the-last-moment", "mixed"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_found(mutant, eagerness, emulate, layer):
    function, text, other, error, complaint = MUTANTS[mutant]
    emulate(eagerness, {function: (text, other)})
    if mutant.startswith("reads-") and eagerness:  # of 240 orders, in one all stop before anybody reads
        error, complaint = (error, Deadlock), f"{complaint}|nothing can go on"
    with pytest.raises(error, match=complaint):
        hopper.conv_fwd(*layer, slope=0.0, config=FEW_PIXELS if text == X_EMPTY else IN_TURNS)


@pytest.mark.parametrize("mutant", ["frees-a-stage-being-read", "overwrites-pixels-too-early", "never-frees-a-stage"])
@pytest.mark.parametrize("config", [COOPERATIVE, NO_HALO], ids=["cooperative", "no-halo"])
def test_in_other_tiles_too(config, mutant, emulate, layer):
    function, text, other, error, complaint = MUTANTS[mutant]
    emulate(0.5, {function: (text, other)})
    with pytest.raises(error, match=complaint):
        hopper.conv_fwd(*layer, slope=0.0, config=config)


def test_a_stage_is_freed_by_both_that_read_it(emulate, layer):
    emulate(0.5, {"_conv_fwd_kernel": ("mbarrier.init(x_empty.index(i), count=warpgroups)",
                                       "mbarrier.init(x_empty.index(i), count=1)")})  # fmt: skip
    with pytest.raises(AssertionError):
        hopper.conv_fwd(*layer, slope=0.0, config=COOPERATIVE)


def test_one_stage_is_not_enough(emulate, layer):
    """A stage is freed when the next product is issued, which needs a second."""
    with pytest.raises(Deadlock):
        hopper.conv_fwd(*layer, slope=0.0, config=config_of(64, (2, 4, 4), False, 1, 1))


@pytest.mark.parametrize("config", [IN_TURNS, COOPERATIVE, NO_HALO], ids=["in-turns", "cooperative", "no-halo"])
def test_an_unchanged_kernel_passes(config, emulate, layer):
    hopper.conv_fwd(*layer, slope=0.0, config=config)
