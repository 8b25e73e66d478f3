"""Launches compiled for sm_90a and run by the machine, on tensors of a CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from triton.runtime import driver

from .block import Block
from .gpu import Gpu, Launch
from .memory import GlobalMemory, TensorMap
from .program import Program, parse
from .translate import Translator

_PARAMETERS = 1 << 20  # where the parameters of a launch would begin


def run(launch: Launch, seed: int) -> None:
    """Every block of it, one after the other."""
    program = parse(launch.ptx)
    if launch.threads != program.threads:
        raise AssertionError(f"{launch.threads} threads of a kernel for {program.threads}")
    parameters, maps = _parameters(program, launch.arguments)
    translation, memory = Translator(program, parameters).translated(), GlobalMemory(launch.tensors)
    registers = program.registers or min(255, 65536 // program.threads)  # as many as there can be
    with np.errstate(all="ignore"):  # numbers overflow as they do on a GPU
        for number, index in enumerate(itertools.product(*map(range, launch.grid))):
            Block(
                translation, threads=program.threads, registers=registers, shared=launch.shared,
                dependent=launch.dependent, memory=memory, maps=maps, index=index, grid=launch.grid, seed=seed + number,
            ).run()  # fmt: skip


def _parameters(program: Program, values: Sequence[int | TensorMap]) -> tuple[dict[str, int], dict[int, TensorMap]]:
    """Parameters' values by name, for a descriptor an address, and descriptors by those."""
    numbers: dict[str, int] = {}
    maps: dict[int, TensorMap] = {}
    for (name, length), value in zip(program.parameters, values, strict=True):
        if (length == 128) != isinstance(value, TensorMap):
            raise AssertionError(f"{name} of {length} bytes is not for {value}")
        if isinstance(value, TensorMap):
            numbers[name] = _PARAMETERS + 128 * len(maps)
            maps[numbers[name]] = value
        else:
            numbers[name] = value
    return numbers, maps


@contextmanager
def machine(seed: int = 0, edit: Callable[[str], str] = lambda ptx: ptx) -> Iterator[list[Launch]]:
    """Within the block launches are compiled for sm_90a and run here, ``edit`` made to them.

    Gives the launches, without their arguments, so that memory is not held.
    """
    launched: list[Launch] = []

    def launch(made: Launch) -> None:
        launched.append(made._replace(arguments=[], tensors=[]))
        run(made._replace(ptx=edit(made.ptx)), seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Gpu(launch))
        yield launched
