"""Launches compiled for sm_90a and run by the machine, on tensors of a CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .block import Block
from .memory import GlobalMemory, TensorMap
from .program import Program, parse
from .translate import Translator

_TFLOAT32 = 11  # of CUtensorMapDataType
_PARAMETERS = 1 << 20  # where the parameters of a launch would begin


class StandIn:
    """As much of a driver as compiling for an H200 needs."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def run(kernel: Any, arguments: dict[str, Any], grid: tuple[int, ...], seed: int) -> None:
    """Every block of a launch, one after the other.

    Args:
        kernel: as Triton compiled it.
        arguments: by name.
    """
    program = parse(kernel.asm["ptx"])
    parameters, maps, tensors = _parameters(program, kernel, arguments)
    translation, memory, size = Translator(program, parameters).translated(), GlobalMemory(tensors), (*grid, 1, 1)[:3]
    # Where nothing is said, as many as fit; only what is said is changed later.
    registers = program.registers or 65536 // program.threads
    for number, index in enumerate(itertools.product(*map(range, size))):
        Block(
            translation, threads=program.threads, registers=registers, shared=kernel.metadata.shared,
            memory=memory, maps=maps, index=index, grid=size, seed=seed + number,
        ).run()  # fmt: skip


def _parameters(
    program: Program, kernel: Any, arguments: dict[str, Any]
) -> tuple[dict[str, int], dict[int, TensorMap], list[Tensor]]:
    values: list[Any] = []
    tensors: list[Tensor] = []
    metas = iter(kernel.metadata.tensordesc_meta or ())
    for name, kind in kernel.src.signature.items():
        value = arguments[name]
        if kind == "constexpr":
            continue
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
        elif isinstance(value, float):
            values.append(int(np.float32(value).view(np.uint32)))
        else:
            values.append(value)
    values += [0] * (len(program.parameters) - len(values))  # scratch memory, of which there is none
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
    return numbers, maps, tensors


@contextmanager
def machine(seed: int = 0) -> Iterator[list[str]]:
    """Within the block launches are compiled for sm_90a and run here; gives their kernels' names."""
    launched: list[str] = []
    compile_ = JITFunction.run

    def compile_and_run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = compile_(self, *args, grid=grid, warmup=True, **options)
        if warmup:
            return kernel
        launched.append(self.fn.__name__)
        run(kernel, dict(zip(self.arg_names, args, strict=False)) | options, grid, seed)
        return kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_and_run)
        patch.setattr(driver, "_active", StandIn())
        yield launched
