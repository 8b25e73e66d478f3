"""Triton's interpreter, made to do what it does once, in less than half the time, and to round and sum as GPUs do.

It is told by its private names; what else it computes stays as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def without_search_for_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for one in every sum of indices, for a third of its time."""
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


def summing_in_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """It adds the elements of a tile one by one, where a GPU adds halves: of 256 some 8 roundings, not 255."""

    def sum_of(self: Any, input: Any) -> Any:
        data = input.handle.data
        for axis in range(data.ndim) if self.axis is None else [self.axis]:
            while data.shape[axis] > 1:
                data = np.add(*np.split(data, 2, axis))
        return self.to_tensor(np.sum(data, axis=self.axis, keepdims=self.keep_dims), input.dtype)

    monkeypatch.setattr(interpreter.ReduceOps, "sum", sum_of)


def rounding_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """It truncates to bfloat16, where a GPU rounds to the nearest, of two as near to the even one."""
    convert: Callable[[Any, Any, Any, Any], Any] = interpreter._convert_float

    def convert_rounding(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding_mode)
        bits = data.view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(data), 0x7FFF, rounded).astype(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", convert_rounding)


@contextlib.contextmanager
def patching_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """It patches ``triton.language`` in each launch and each call of a device function: here once within the block.

    A test's own patches of ``triton.language`` have to come before its first launch.
    """
    patch: Callable[[Any], Any] = interpreter._patch_lang
    scopes: dict[frozenset[Any], Any] = {}  # by the modules that each patches

    @functools.cache
    def modules_of(fn: Any) -> frozenset[Any]:
        return frozenset(m for m in fn.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core))

    def once(fn: Any) -> Any:
        modules = modules_of(fn)
        if modules not in scopes:
            scopes[modules] = patch(fn)
        return interpreter._LangPatchScope()  # nothing to restore after the launch

    monkeypatch.setattr(interpreter, "_patch_lang", once)
    try:
        yield
    finally:
        for scope in reversed(scopes.values()):
            scope.restore()


def remembering_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """It works out the type and shape of each tensor anew, for two fifths of its time."""
    numpy_type: Callable[[Any], Any] = interpreter._get_np_dtype
    make_type: Callable[[Any, Any, Any], None] = tl.block_type.__init__
    make_tensor: Callable[[Any, Any, Any], None] = tl.tensor.__init__
    numpy_types: dict[str, Any] = {}
    types: dict[tuple[Any, ...], dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    def numpy_type_once(type: Any) -> Any:
        name = str(type)
        if name not in numpy_types:
            numpy_types[name] = numpy_type(type)
        return numpy_types[name]

    def make_type_once(self: Any, element_ty: Any, shape: Any) -> None:
        sides = [getattr(side, "value", side) for side in shape]
        key = str(element_ty), getattr(element_ty, "address_space", None), *((type(side), side) for side in sides)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = vars(self).copy()
        vars(self).update(types[key])

    def make_tensor_once(self: Any, handle: Any, type: Any) -> None:
        name = str(type)
        if name not in tensors:
            make_tensor(self, None, type)
            tensors[name] = vars(self).copy()
        vars(self).update(tensors[name], handle=handle, type=type, dtype=type.scalar)

    monkeypatch.setattr(interpreter, "_get_np_dtype", numpy_type_once)
    monkeypatch.setattr(tl.block_type, "__init__", make_type_once)
    monkeypatch.setattr(tl.tensor, "__init__", make_tensor_once)


def checking_operands_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks in each operation whether its operands go together and makes a tile of a number: a fifth of its time."""
    check: Callable[..., Any] = TritonSemantic.binary_op_type_checking_impl
    tiles: dict[tuple[Any, ...], Any] = {}

    def check_once(
        self: Any,
        lhs: Any,
        rhs: Any,
        lhs_ptr: Any = False,
        rhs_ptr: Any = False,
        arithmetic: Any = True,
        div: Any = False,
    ) -> Any:
        given = lhs_ptr, rhs_ptr, arithmetic, div
        if not isinstance(lhs, tl.tensor):
            return check(self, lhs, rhs, *given)
        if isinstance(rhs, tl.tensor):
            # Of one type and shape they stay as they are, but that a quotient of halves is a float32.
            alike = str(lhs.type) == str(rhs.type) and not lhs.dtype.is_ptr() and not div
            return (lhs, rhs) if alike else check(self, lhs, rhs, *given)
        key = repr(rhs), type(rhs), str(lhs.type), given
        if key not in tiles:
            wanted, tile = check(self, lhs, rhs, *given)
            if wanted is not lhs:
                return wanted, tile
            tiles[key] = tile
        return lhs, tiles[key]

    monkeypatch.setattr(TritonSemantic, "binary_op_type_checking_impl", check_once)
