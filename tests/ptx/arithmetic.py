"""What instructions compute: functions of lanes' registers, which are arrays of bits (uint16, uint32, uint64, bool)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

Lanes = Any  # an array of a register's bits, one element a lane
Function = Callable[..., Any]

_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
_BITS = {"pred": 1, "bf16": 16, "f16x2": 32, "bf16x2": 32}


def bits_of(kind: str) -> int:
    """Bits of ``f32``, ``s64``, ``pred``, ..."""
    return _BITS.get(kind) or int(kind.lstrip("bfsu"))


def from_bits(kind: str, x: Lanes) -> Lanes:
    """Numbers of the type ``kind``; of two in one register an axis more."""
    if kind.endswith("x2"):
        return from_bits(kind[:-2], x.view(np.uint16).reshape(*x.shape, 2))
    if kind == "bf16":
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind in _FLOATS:
        return x.view(_FLOATS[kind])
    if kind == "pred":
        return x
    bits = bits_of(kind)
    x = x.astype(_UNSIGNED[bits], copy=False)  # an operand may be wider than what is read of it
    return x.view(_SIGNED[bits]) if kind.startswith("s") else x


def to_bits(kind: str, x: Lanes) -> Lanes:
    """The register of numbers, rounded to the nearest of ``kind``, ties to even."""
    if kind.endswith("x2"):
        return np.ascontiguousarray(to_bits(kind[:-2], x)).view(np.uint32)[..., 0]
    if kind == "bf16":
        x = np.asarray(x, np.float32)
        raw = x.view(np.uint32)
        rounded = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)
    if kind in _FLOATS:
        return np.asarray(x).astype(_FLOATS[kind]).view(_UNSIGNED[bits_of(kind)])
    if kind == "pred":
        return x
    bits = bits_of(kind)
    return np.asarray(x).astype(_SIGNED[bits] if kind.startswith("s") else _UNSIGNED[bits]).view(_UNSIGNED[bits])


def _typed(kind: str, function: Function, result: str | None = None) -> Function:
    """``function`` of numbers as one of bits; float16 and bfloat16 are computed in float32 and rounded once."""
    wide = kind.startswith(("f16", "bf16"))

    def of_bits(*operands: Lanes) -> Lanes:
        numbers = [from_bits(kind, x) for x in operands]
        if wide:
            numbers = [x.astype(np.float32) for x in numbers]
        return to_bits(result or kind, function(*numbers))

    return of_bits


def _fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _divide(a: Lanes, b: Lanes) -> Lanes:
    """Towards zero, as C."""
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a.astype(object)) // np.abs(b.astype(object))
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def _remainder(a: Lanes, b: Lanes) -> Lanes:
    return a - _divide(a, b) * b


def _high(a: Lanes, b: Lanes) -> Lanes:
    """The upper half of a product."""
    return ((a.astype(object) * b.astype(object)) >> (8 * a.itemsize)).astype(a.dtype)


def _shift(kind: str, function: Function) -> Function:
    """By more than the register has bits, nothing but the sign is left."""
    bits = bits_of(kind)

    def of_bits(x: Lanes, by: Lanes) -> Lanes:
        x = from_bits(kind, x)
        most = np.minimum(by, bits - 1).astype(x.dtype)
        shifted = function(x, most)
        if not kind.startswith("s"):
            shifted = np.where(by < bits, shifted, 0).astype(x.dtype)
        return to_bits(kind, shifted)

    return of_bits


def _field(kind: str, x: Lanes, start: Lanes, length: Lanes) -> Lanes:
    """bfe.u32, bfe.s32: ``length`` bits from ``start`` on; of the second the uppermost is the sign."""
    above = np.uint64(64) - length.astype(np.uint64)
    moved = (x.astype(np.uint64) >> start.astype(np.uint64)) << above
    return (moved.view(np.int64) >> above.view(np.int64) if kind == "s32" else moved >> above).astype(x.dtype)


def _permuted(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """prmt.b32: each byte of the result one of the eight of b:a."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(a)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (choice & np.uint32(7)).astype(np.uint64))) & np.uint64(255)
        byte = np.where(choice & np.uint32(8), np.where(byte & np.uint64(128), 255, 0), byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def rounded_to_tf32(x: Lanes) -> Lanes:
    """cvt.rna.tf32.f32: to 10 bits of mantissa, ties away from 0."""
    return np.where(np.isfinite(x.view(np.float32)), (x + np.uint32(0x1000)) & np.uint32(0xFFFFE000), x)


def truncated_to_tf32(x: Lanes) -> Lanes:
    """What tensor cores see of float32."""
    return (x & np.uint32(0xFFFFE000)).view(np.float32)


_COMPARISONS: dict[str, Function] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b), "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "equ": lambda a, b: ~((a < b) | (a > b)), "neu": lambda a, b: ~(a == b),
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}  # fmt: skip
_COMBINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not}
_NUMERIC: dict[str, Function] = {
    "add": operator.add, "sub": operator.sub, "neg": operator.neg, "abs": np.abs, "div": _divide, "rem": _remainder,
    "fma": _fma, "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1 / x, "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "tanh": np.tanh,
}  # fmt: skip
# Of approximations the nearest number is given; what the hardware gives is within a few roundings of it.
_ROUNDING = {"rn", "rna", "rni", "rz", "rzi", "rmi", "rpi", "full", "approx", "ftz", "sat", "satfinite", "relu"}


def _comparison(parts: tuple[str, ...]) -> Function:
    kind, compare = parts[-1], _COMPARISONS[parts[1]]
    combine = next((_COMBINED[part] for part in parts[2:-1] if part in _COMBINED), None)

    def of_bits(a: Lanes, b: Lanes, *other: Lanes) -> Lanes:
        found = compare(from_bits(kind, a), from_bits(kind, b))
        if combine is not None:
            found = combine(found, other[0])
        return (found[..., 0], found[..., 1]) if kind.endswith("x2") else found

    return of_bits


def _conversion(parts: tuple[str, ...]) -> Function:
    to, source, modifiers = parts[-2], parts[-1], set(parts[1:-2])
    if to.endswith("x2"):  # the first operand is the upper half
        return lambda high, low: to_bits(to, np.stack([from_bits(source, low), from_bits(source, high)], -1))
    if to == "tf32":
        return rounded_to_tf32
    if modifiers - _ROUNDING:
        raise NotImplementedError(".".join(parts))
    round_to = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    rounding = next((round_to[part] for part in parts if part in round_to), None)

    def of_bits(x: Lanes) -> Lanes:
        numbers = from_bits(source, x)
        if to.startswith(("f", "b")) and source in ("f16", "bf16"):
            numbers = numbers.astype(np.float32)
        return to_bits(to, numbers if rounding is None else rounding(numbers))

    return of_bits


def _extreme(parts: tuple[str, ...]) -> Function:
    floating = {"min": np.fmin, "max": np.fmax}
    if "NaN" in parts:
        floating = {"min": np.minimum, "max": np.maximum}
    whole = {"min": np.minimum, "max": np.maximum}
    return _typed(parts[-1], (floating if "f" in parts[-1] else whole)[parts[0]])


def _product(parts: tuple[str, ...]) -> Function:
    name, kind = parts[0], parts[-1]
    plus = (lambda product, c: product + c) if name == "mad" else lambda product: product
    if kind.startswith(("f", "bf")):
        return _typed(kind, _fma if name == "mad" else operator.mul)
    if "wide" in parts:
        double = f"{kind[0]}{2 * bits_of(kind)}"

        def of_bits(a: Lanes, b: Lanes, *c: Lanes) -> Lanes:
            long = from_bits(double, to_bits(double, from_bits(kind, a)))
            other = from_bits(double, to_bits(double, from_bits(kind, b)))
            return to_bits(double, plus(long * other, *(from_bits(double, x) for x in c)))

        return of_bits
    multiply = _high if "hi" in parts else operator.mul
    return _typed(kind, lambda a, b, *c: plus(multiply(a, b), *c))


def multiplied(shape: str, kind: str, a: list[Lanes], b: list[Lanes], c: list[Lanes]) -> list[Lanes]:
    """mma.sync: 16 x 8 sums of a warp."""
    k = int(shape.removeprefix("m16n8k"))
    if kind == "tf32":
        a, b = ([truncated_to_tf32(x)[:, None] for x in operand] for operand in (a, b))
    else:
        a, b = ([from_bits(f"{kind}x2", x).astype(np.float32) for x in operand] for operand in (a, b))
    each = a[0].shape[1]  # elements of a row in a register
    assert len(a) * each * 2 == k, (shape, kind)
    # a: [k's upper half, row's upper half, row, lane of the row, element]
    left = np.stack(a).reshape(2, 2, 8, 4, each).transpose(1, 2, 0, 3, 4).reshape(16, k)
    right = np.stack(b).reshape(2, 8, 4, each).transpose(0, 2, 3, 1).reshape(k, 8)
    sums = np.stack(c).view(np.float32).reshape(2, 2, 8, 4).transpose(0, 2, 3, 1).reshape(16, 8) + left @ right
    laid_out = sums.reshape(2, 8, 4, 2).transpose(0, 3, 1, 2).reshape(4, 32)
    return [np.ascontiguousarray(lanes).view(np.uint32) for lanes in laid_out]


def function_of(parts: tuple[str, ...]) -> Function:
    """What the instruction with this opcode computes of its operands' bits.

    Raises:
        NotImplementedError: if it is not known here.
    """
    name, kind = parts[0], parts[-1]
    if name == "setp":
        return _comparison(parts)
    if name == "selp":
        return lambda a, b, chosen: np.where(chosen, a, b)
    if name in ("mov", "cvta"):
        return lambda x: x
    if name == "cvt":
        return _conversion(parts)
    if name in _LOGIC and kind == "pred":
        return {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}[name]
    if name in _LOGIC:
        return _LOGIC[name]
    if name == "shl":
        return _shift(kind.replace("s", "b"), np.left_shift)
    if name == "shr":
        return _shift(kind, np.right_shift)
    if name == "bfe" and kind in ("u32", "s32"):
        return partial(_field, kind)
    if name == "prmt":
        return _permuted
    if name in ("min", "max"):
        return _extreme(parts)
    if name in ("mul", "mad"):
        return _product(parts)
    if name in _NUMERIC and not set(parts[1:-1]) - _ROUNDING:
        return _typed(kind, _NUMERIC[name])
    raise NotImplementedError(".".join(parts))
