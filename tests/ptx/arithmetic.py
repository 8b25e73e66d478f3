"""What instructions compute: functions of lanes' registers, which are arrays of bits (uint16, uint32, uint64, bool)."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

Lanes = Any  # an array of a register's bits, one element a lane
Function = Callable[..., Any]

_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
_BITS = {"pred": 1, "bf16": 16, "f16x2": 32, "bf16x2": 32, "s16x2": 32}


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


def _of_numbers(kind: str, function: Function) -> Function:
    """``function`` of numbers as one of bits."""
    return lambda *operands: to_bits(kind, function(*(from_bits(kind, x) for x in operands)))


def _fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _divide(a: Lanes, b: Lanes) -> Lanes:
    """Towards zero, as C; all bits set where it is by 0."""
    wide = np.int64 if a.itemsize < 8 else object
    by = np.where(b == 0, 1, b).astype(wide)
    quotient = np.abs(a.astype(wide)) // np.abs(by)
    quotient = np.where((a < 0) != (b < 0), -quotient, quotient) & (1 << 8 * a.itemsize) - 1
    return np.where(b == 0, -1, quotient.astype(f"u{a.itemsize}").view(a.dtype)).astype(a.dtype)


def _high(a: Lanes, b: Lanes) -> Lanes:
    """The upper half of a product."""
    return ((a.astype(object) * b.astype(object)) >> (8 * a.itemsize)).astype(a.dtype)


def _shift(kind: str, function: Function) -> Function:
    """By more than the register has bits, nothing but the sign is left."""
    bits = bits_of(kind)

    def of_bits(x: Lanes, by: Lanes) -> Lanes:
        x = from_bits(kind, x)
        shifted = function(x, np.minimum(by, bits - 1).astype(x.dtype))
        if not kind.startswith("s"):
            shifted = np.where(by < bits, shifted, 0).astype(x.dtype)
        return to_bits(kind, shifted)

    return of_bits


def _field(kind: str) -> Function:
    """bfe: bits from a place on, of so many; beyond the uppermost more of the sign, or zeros."""

    def of_bits(x: Lanes, start: Lanes, length: Lanes) -> Lanes:
        start, length = (np.minimum(operand & np.uint32(255), 32).astype(np.int64) for operand in (start, length))
        number = from_bits(kind, x).astype(np.int64) >> start
        found = number & (np.int64(1) << length) - 1
        if kind == "s32":
            sign = (from_bits(kind, x).astype(np.int64) >> np.minimum(start + length - 1, 31)) & 1
            found = np.where((length > 0) & (sign == 1), found | (np.int64(-1) << length), found)
        return (found & 0xFFFFFFFF).astype(np.uint32)

    return of_bits


def _permuted(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """prmt.b32: each byte of the result one of the eight of b:a, or its sign."""
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
    "eq": operator.eq, "ne": lambda a, b: (a < b) | (a > b), "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b), "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "equ": lambda a, b: ~((a < b) | (a > b)), "neu": lambda a, b: ~(a == b),
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}  # fmt: skip


def _comparison(compare: str, kind: str) -> Function:
    def of_bits(a: Lanes, b: Lanes) -> Lanes:
        found = _COMPARISONS[compare](from_bits(kind, a), from_bits(kind, b))
        return (found[..., 0], found[..., 1]) if kind.endswith("x2") else found

    return of_bits


def _between_integers(to: str, source: str) -> Function:
    def of_bits(x: Lanes) -> Lanes:
        found = from_bits(to, to_bits(to, from_bits(source, x)))
        if bits_of(to) == 8:  # in a register of 16, which has the sign in its upper half
            return to_bits(f"{to[0]}16", found)
        return to_bits(to, found)

    return of_bits


def _of_floats(name: str, propagates: bool) -> Function:
    """The larger or smaller number, of -0 and +0 too; NaN if both are, or where it ``propagates``."""
    choose = {(False, "min"): np.fmin, (False, "max"): np.fmax, (True, "min"): np.minimum, (True, "max"): np.maximum}
    both = np.bitwise_and if name == "max" else np.bitwise_or

    def of_bits(a: Lanes, b: Lanes) -> Lanes:
        x, y = (np.where(np.isnan(z), np.float32(np.nan), z) for z in (a.view(np.float32), b.view(np.float32)))
        return np.where(x == y, both(a, b), choose[propagates, name](x, y).view(np.uint32))

    return of_bits


def _product(name: str, half: str, kind: str) -> Function:
    plus: Function = (lambda product, c: product + c) if name == "mad" else lambda product: product
    if half != "wide":
        multiply = _high if half == "hi" else operator.mul
        return _of_numbers(kind, lambda a, b, *c: plus(multiply(a, b), *c))
    double = f"{kind[0]}{2 * bits_of(kind)}"
    widened = lambda x: from_bits(double, to_bits(double, from_bits(kind, x)))
    return lambda a, b, *c: to_bits(double, plus(widened(a) * widened(b), *(from_bits(double, x) for x in c)))


def _flushed(x: Lanes) -> Lanes:
    """.ftz: zeros for numbers below the normal ones."""
    return np.where(np.abs(x) < np.finfo(np.float32).smallest_normal, np.copysign(np.float32(0), x), x)


def _quotient_or_root(name: str, ftz: str | None) -> Function:
    one = np.float32(1)
    of_numbers: dict[str, Function] = {
        "div": operator.truediv, "rcp": lambda x: one / x, "sqrt": np.sqrt, "rsqrt": lambda x: one / np.sqrt(x),
        "ex2": np.exp2,
    }  # fmt: skip
    flush = _flushed if ftz else lambda x: x
    return _of_numbers("f32", lambda *numbers: flush(of_numbers[name](*map(flush, numbers))))


_LOGIC: dict[str, Function] = {
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not,
}  # fmt: skip
_NUMERIC: dict[str, Function] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg, "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b, "min": np.minimum, "max": np.maximum,
}  # fmt: skip
_INTEGER = r"([su](?:16|32|64))"
# By the whole opcode: whatever else it says may mean another thing. Of approximations the nearest number is given.
_INSTRUCTIONS: list[tuple[str, Callable[..., Function]]] = [
    (r"(?:mov\.(?:[bus]\d+|pred)|cvta\.param\.u64)", lambda: lambda x: x),
    (r"selp\.(?:b16|b32|b64|f32)", lambda: lambda a, b, chosen: np.where(chosen, a, b)),
    (r"(and|or|xor|not)\.(?:b16|b32|b64|pred)", lambda name: _LOGIC[name]),
    (r"(add|sub|mul)(?:\.rn)?\.(f32)", lambda name, kind: _of_numbers(kind, _NUMERIC[name])),
    (rf"(add|sub|neg|div|rem|min|max)\.{_INTEGER}", lambda name, kind: _of_numbers(kind, _NUMERIC[name])),
    (r"(add)\.(s16x2)", lambda name, kind: _of_numbers(kind, _NUMERIC[name])),
    (r"min\.relu\.(s32)", lambda kind: _of_numbers(kind, lambda a, b: np.maximum(np.minimum(a, b), 0))),
    (r"(min|max)(\.NaN)?\.f32", lambda name, propagates: _of_floats(name, propagates is not None)),
    (rf"(mul|mad)\.(lo|hi|wide)\.{_INTEGER}", _product),
    (r"fma\.rn\.(f32)", lambda kind: _of_numbers(kind, _fma)),
    (r"(neg|abs)\.(f32)", lambda name, kind: _of_numbers(kind, {"neg": operator.neg, "abs": np.abs}[name])),
    (r"(div|rcp|sqrt|rsqrt|ex2)\.(?:full|approx|rn)(\.ftz)?\.f32", _quotient_or_root),
    (r"setp\.(\w+)\.([bsu](?:16|32|64)|f32|b?f16(?:x2)?)", _comparison),
    (r"shl\.(b(?:16|32|64))", lambda kind: _shift(kind, np.left_shift)),
    (r"shr\.([su](?:16|32|64))", lambda kind: _shift(kind, np.right_shift)),
    (r"bfe\.([su]32)", _field),
    (r"prmt\.b32", lambda: _permuted),
    (r"cvt\.([su](?:8|16|32|64))\.([su](?:8|16|32|64))", _between_integers),
    (r"cvt\.rna\.tf32\.f32", lambda: rounded_to_tf32),
    (r"cvt\.(f32)\.(b?f16)", lambda to, source: lambda x: to_bits(to, from_bits(source, x))),
    (r"cvt\.rn\.(b?f16)\.(f32)", lambda to, source: lambda x: to_bits(to, from_bits(source, x))),
    (r"cvt\.rn\.(f32)\.([su](?:16|32|64))", lambda to, source: lambda x: to_bits(to, from_bits(source, x))),
    # The first operand is the upper half.
    (
        r"cvt\.rn\.(b?f16x2)\.(f32)",
        lambda to, source: lambda high, low: to_bits(to, np.stack([from_bits(source, x) for x in (low, high)], -1)),
    ),
]


def function_of(opcode: str) -> Function:
    """What the instruction with this opcode computes of its operands' bits.

    Raises:
        NotImplementedError: if it is not known here.
    """
    for pattern, make in _INSTRUCTIONS:
        if found := re.fullmatch(pattern, opcode):
            return make(*found.groups())
    raise NotImplementedError(opcode)


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
