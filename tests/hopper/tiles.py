"""Distributed tensors and pointers of the emulator, and the part of ``gl`` that works on them."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as real


def torch_dtype(dtype: Any) -> torch.dtype:
    """``gl.bfloat16`` -> ``torch.bfloat16``."""
    name: str = dtype.name
    return getattr(torch, {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}.get(name, name))


def _data(value: Any) -> Any:
    return value.data if isinstance(value, Tile) else value


class Tile:
    """A tensor in registers. Its layout is carried along and never looked at."""

    def __init__(self, data: Tensor, layout: Any) -> None:
        self.data, self.layout = data, layout

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def type(self) -> Tile:
        return self  # for .type.layout

    def to(self, dtype: Any) -> Tile:
        return Tile(self.data.to(torch_dtype(dtype)), self.layout)

    def reshape(self, shape: list[int]) -> Tile:
        return Tile(self.data.reshape(shape), None)


def _binary(function: Callable[[Any, Any], Any], swapped: bool = False) -> Callable[[Tile, Any], Tile]:
    def method(self: Tile, other: Any) -> Tile:
        a, b = self.data, _data(other)
        return Tile(function(b, a) if swapped else function(a, b), self.layout)

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "lt", "le", "gt", "ge", "eq", "ne", "and_", "or_"):
    setattr(Tile, f"__{_name.strip('_')}__", _binary(getattr(operator, _name)))
for _name in ("add", "sub", "mul"):
    setattr(Tile, f"__r{_name}__", _binary(getattr(operator, _name), swapped=True))


@dataclass
class Pointer:
    """A tensor's memory, at an offset or many."""

    tensor: Tensor
    offset: Any = 0

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=getattr(real, str(self.tensor.dtype).removeprefix("torch.")))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + offset)


def _flat(tensor: Tensor) -> Tensor:
    """Its memory, as a pointer to its first element sees it."""
    return tensor.as_strided((tensor.numel(),), (1,))


class Gluon:
    """``gl``: what is not here is Gluon's own (layouts, dtypes)."""

    static_range = staticmethod(range)

    def __init__(self, block: Any, allocate: Callable[..., Any]) -> None:
        self.block, self.allocate_shared_memory = block, allocate

    def __getattr__(self, name: str) -> Any:
        value = getattr(real, name)
        assert name[0].isupper() or isinstance(value, real.dtype), f"gl.{name} is not emulated"
        return value

    def program_id(self, axis: int) -> int:
        return self.block.program

    def num_programs(self, axis: int) -> int:
        return self.block.programs

    def warp_specialize(self, functions: Any, warps: list[int], registers: list[int]) -> None:
        assert len(functions) == len(warps) + 1 == len(registers) + 1
        self.block.specialize(functions)

    minimum = staticmethod(min)

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    @staticmethod
    def zeros(shape: list[int], dtype: Any, layout: Any) -> Tile:
        return Tile(torch.zeros(shape, dtype=torch_dtype(dtype)), layout)

    @staticmethod
    def arange(start: int, end: int, layout: Any) -> Tile:
        return Tile(torch.arange(start, end), layout)

    @staticmethod
    def expand_dims(tile: Tile, axis: int) -> Tile:
        return Tile(tile.data.unsqueeze(axis), tile.layout)

    @staticmethod
    def where(condition: Tile, a: Any, b: Any) -> Tile:
        return Tile(torch.where(condition.data, _data(a), _data(b)), condition.layout)

    def load(self, pointer: Pointer, mask: Tile | None = None, other: float | None = None) -> Tile:
        self.block.touch_global()
        if mask is None or other is None:
            return Tile(_flat(pointer.tensor)[pointer.offset], None)
        inside = pointer.offset.data.masked_fill(~mask.data, 0)
        return Tile(_flat(pointer.tensor)[inside].masked_fill(~mask.data, other), None)

    def store(self, pointer: Pointer, tile: Tile, mask: Tile) -> None:
        self.block.touch_global()
        _flat(pointer.tensor)[pointer.offset.data[mask.data]] = tile.data[mask.data]

    @staticmethod
    def convert_layout(tile: Tile, layout: Any) -> Tile:
        return Tile(tile.data, layout)

    @staticmethod
    def sum(tile: Tile, axis: int) -> Tile:
        return Tile(tile.data.sum(axis), None)

    @staticmethod
    def reduce(tile: Tile, axis: int, combine: Callable[[Tile, Tile], Tile]) -> Tile:
        first, *rest = (Tile(part, None) for part in tile.data.unbind(axis))
        for part in rest:
            first = combine(first, part)
        return first
