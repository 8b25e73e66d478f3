"""Shared by all tests: where kernels run, poisoned memory, fresh random inputs."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

CUDA = torch.cuda.is_available()
# Kernels are compiled for sm_90a and run by the machine of tests/ptx, not in the interpreter, in this share of the
# tests that are asked for.
COMPILED = float(os.environ.get("FASTUNET_COMPILED", 0))
if not CUDA and not COMPILED:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is decorated
elif COMPILED:
    os.environ.pop("TRITON_INTERPRET", None)

# That cache knows an operator by its name alone: a changed gradient would be taken for the one of an earlier run.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker a core; their threads, and those of the processes that they start, would fight for them.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

from fastunet import dispatch, measured  # noqa: E402
from fastunet.cli import main  # noqa: E402
from fastunet.parity.repeatability import poisoned_memory  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if 0 < COMPILED < 1:
        # By name: the same in all processes of a run, and in each run.
        drawn = {item: zlib.crc32(item.nodeid.encode()) < COMPILED * 2**32 for item in items}
        config.hook.pytest_deselected(items=[item for item in items if not drawn[item]])
        items[:] = [item for item in items if drawn[item]]
    # First, so that of several processes none is left alone with a long test.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not CUDA:
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)
    if not COMPILED and not CUDA:
        skip = pytest.mark.skip(reason="of compiled kernels, which `make triton` tests")
        for item in items:
            if item.get_closest_marker("compiled"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def quick_interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """It looks for overflow only where a test asks for that; and it rounds and sums as GPUs do."""
    if CUDA:
        yield
        return
    if COMPILED:
        from .ptx.launches import machine

        with machine(request.getfixturevalue("seed")):
            yield
        return
    from . import interpreter

    interpreter.remembering_types(monkeypatch)
    interpreter.checking_operands_once(monkeypatch)
    interpreter.rounding_to_nearest(monkeypatch)
    for module in ("configs", "gradients", "harness"):  # which allow for an interpreter that truncates
        monkeypatch.setattr(f"fastunet.parity.{module}.truncating_stages", lambda stages, *_: stages)
    interpreter.summing_in_a_tree(monkeypatch)
    if request.node.get_closest_marker("overflow") is None:
        interpreter.without_search_for_overflow(monkeypatch)
    with interpreter.patching_once(monkeypatch):
        yield


@pytest.fixture(autouse=True)
def operators_for_small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU leaves those to plain PyTorch, which would be tested against itself."""
    for least in ("LEAST_WORK", "LEAST_WORK_IN_16_BITS"):
        monkeypatch.setattr(f"fastunet.small.{least}", 0)


@pytest.fixture(autouse=True)
def plans_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test may replace what those of another were made of."""
    monkeypatch.setattr("fastunet.ops.operator._kept", {})


@pytest.fixture
def device() -> str:
    """Where kernels run: the GPU if there is one, else the CPU through Triton's interpreter."""
    return DEVICE


@pytest.fixture
def seed() -> int:
    """A fresh seed, printed; pytest shows it when the test fails. FASTUNET_SEED repeats one."""
    value = int(os.environ.get("FASTUNET_SEED", torch.seed() % 2**31))
    print(f"FASTUNET_SEED={value}")  # noqa: T201
    torch.manual_seed(value)
    return value


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty returns NaN, so that an element nobody wrote is seen."""
    with poisoned_memory():
        yield


class Run(NamedTuple):
    """What one command left behind."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return self.err.splitlines()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """run("segment", path): a command line's exit code and output."""

    def call(*arguments: object) -> Run:
        before = capsys.readouterr().out  # the seed, which a failure must still show
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's way out
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        print(before, end="")  # noqa: T201
        return Run(code, captured.out, captured.err)

    return call


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As much of an H200 as a choice asks about, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    measured.table.cache_clear()
    yield
    measured.table.cache_clear()
