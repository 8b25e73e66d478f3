"""The Hopper launchers with their kernel in the emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastunet.kernels.hopper import conv3x3, tuning

from ..conftest import COMPILED
from .emulator import Emulated

PROGRAMS = 2  # few, so that each takes several tiles


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[Callable[..., None]]:
    """emulate(eagerness, mutations): from now on the kernel runs in the emulator, on ``PROGRAMS`` programs."""
    if torch.cuda.is_available():
        pytest.skip("the emulator stands in for a GPU")
    if COMPILED:
        monkeypatch.setattr(conv3x3, "multiprocessors", lambda device: PROGRAMS)
        yield lambda *arguments: None
        return
    kernel = conv3x3._conv_fwd_kernel
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its tensors are small

    def start(eagerness: float = 0.5, mutations: dict[str, tuple[str, str]] | None = None) -> None:
        emulated: Any = Emulated(kernel, seed, eagerness, mutations)
        monkeypatch.setattr(conv3x3, "_conv_fwd_kernel", emulated)
        monkeypatch.setattr(conv3x3, "multiprocessors", lambda device: PROGRAMS)

    start()
    yield start
    torch.set_num_threads(threads)


def config_of(block_co: int, tile: tuple[int, int, int], halo: bool, x_stages: int, w_stages: int, splits: int = 1):
    """A configuration of few pixels, which the emulator runs quickly; with no halo where Triton compiles none."""
    halo = halo and (tuning.OVERLAPPING_WINDOWS or not COMPILED)
    return tuning.HopperConfig(block_co, *tile, halo, x_stages, w_stages, splits)
