"""Launches compiled for sm_90a and run by the machine, on tensors of a CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.sass import StandInDriver

from .block import Block
from .memory import GlobalMemory, TensorMap
from .program import Program, parse
from .translate import Translator

Argument = int | float | TensorMap
_TFLOAT32 = 11  # of CUtensorMapDataType
_PARAMETERS = 1 << 20  # where the parameters of a launch would begin


def run(
    ptx: str,
    arguments: Sequence[Argument],
    grid: tuple[int, ...],
    *,
    shared: int,
    tensors: Iterable[Tensor],
    seed: int,
    dependent: bool = False,
) -> None:
    """Every block of a launch, one after the other.

    Args:
        arguments: of the parameters that ``ptx`` declares, in their order; but for scratch memory at the end.
        shared: bytes a block. tensors: all whose memory may be touched.
        dependent: whether it may begin before the launch before it has ended.
    """
    program = parse(ptx)
    parameters, maps = _parameters(program, arguments)
    translation, memory, size = Translator(program, parameters).translated(), GlobalMemory(tensors), (*grid, 1, 1)[:3]
    registers = program.registers or min(255, 65536 // program.threads)  # as many as there can be
    with np.errstate(all="ignore"):  # numbers overflow as they do on a GPU
        for number, index in enumerate(itertools.product(*map(range, size))):
            Block(
                translation, threads=program.threads, registers=registers, shared=shared, dependent=dependent,
                memory=memory, maps=maps, index=index, grid=size, seed=seed + number,
            ).run()  # fmt: skip


def _parameters(program: Program, values: Sequence[Argument]) -> tuple[dict[str, int], dict[int, TensorMap]]:
    """Parameters' values by name, for a descriptor an address, and descriptors by those."""
    missing = len(program.parameters) - len(values)
    if missing not in (0, 2):  # the addresses of two scratch memories, of which there is none
        raise AssertionError(f"{len(values)} arguments of {len(program.parameters)} parameters")
    values = [*values, *[0] * missing]
    numbers: dict[str, int] = {}
    maps: dict[int, TensorMap] = {}
    for (name, length), value in zip(program.parameters, values, strict=True):
        if (length == 128) != isinstance(value, TensorMap):
            raise AssertionError(f"{name} of {length} bytes is not for {value}")
        if isinstance(value, TensorMap):
            numbers[name] = _PARAMETERS + 128 * len(maps)
            maps[numbers[name]] = value
        else:
            numbers[name] = int(np.float32(value).view(np.uint32)) if isinstance(value, float) else value
    return numbers, maps


def _flattened(kernel: Any, arguments: dict[str, Any]) -> tuple[list[Argument], list[Tensor]]:
    """What Triton passes for a compiled kernel's arguments, by name, and the tensors among them."""
    values: list[Argument] = []
    tensors: list[Tensor] = []
    metas = iter(kernel.metadata.tensordesc_meta or ())
    for name, kind in kernel.src.signature.items():
        if kind == "constexpr":
            continue
        value = arguments[name]
        if kind.startswith("tensordesc"):
            meta, base = next(metas), value.base
            tensors.append(base)
            itemsize = base.element_size()
            values.append(
                TensorMap(
                    base.data_ptr(), tuple(value.shape), tuple(s * itemsize for s in value.strides),
                    tuple(meta["block_size"]), itemsize, meta["swizzle"],
                    getattr(value, "round_f32_to_tf32", False) or meta["elem_type"] == _TFLOAT32,
                )
            )  # fmt: skip
            values += [*value.shape, *value.strides]
        elif isinstance(value, Tensor):
            tensors.append(value)
            values.append(value.data_ptr())
        else:
            values.append(value)
    return values, tensors


@contextmanager
def machine(seed: int = 0, edit: Callable[[str], str] = lambda ptx: ptx) -> Iterator[list[str]]:
    """Within the block launches are compiled for sm_90a and run here, ``edit`` made to them; gives their names."""
    launched: list[str] = []
    compile_ = JITFunction.run

    def compile_and_run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel: Any = compile_(self, *args, grid=grid, warmup=True, **options)
        if warmup:
            return kernel
        launched.append(self.fn.__name__)
        values, tensors = _flattened(kernel, dict(zip(self.arg_names, args, strict=False)) | options)
        shared = kernel.metadata.shared
        dependent = kernel.metadata.launch_pdl
        run(edit(kernel.asm["ptx"]), values, grid, shared=shared, tensors=tensors, seed=seed, dependent=dependent)
        return kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_and_run)
        patch.setattr(driver, "_active", StandInDriver(90))
        yield launched
