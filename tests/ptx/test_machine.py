"""The machine itself: what instructions compute, and what it says of programs that are wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from .arithmetic import function_of, multiplied
from .gpu import Launch
from .launches import run
from .memory import Fault, TensorMap, swizzled


@pytest.fixture
def bits(seed):
    """bits(dtype): 32 lanes of any bits of that many."""
    numbers = np.random.default_rng(seed)
    return lambda dtype: numbers.integers(0, np.iinfo(dtype).max, 32, dtype, endpoint=True)


def of(opcode: str, *operands: Any) -> Any:
    with np.errstate(all="ignore"):
        return function_of(opcode)(*operands)


def signed(x: Any) -> list[int]:
    return [int(value) for value in x.view(np.int32)]


def lanes(values: list[int], dtype: Any = np.uint32) -> Any:
    size = 8 * np.dtype(dtype).itemsize
    return np.array([value % 2**size for value in values], dtype)


def test_integers_are_those_of_python(bits):
    a, b, c = bits(np.uint32), bits(np.uint32), bits(np.uint32)
    wide, others = signed(a), signed(b)
    np.testing.assert_array_equal(of("add.s32", a, b), lanes([x + y for x, y in zip(wide, others, strict=True)]))
    np.testing.assert_array_equal(of("mul.lo.s32", a, b), lanes([x * y for x, y in zip(wide, others, strict=True)]))
    np.testing.assert_array_equal(
        of("mul.hi.s32", a, b), lanes([x * y >> 32 for x, y in zip(wide, others, strict=True)])
    )
    np.testing.assert_array_equal(
        of("mul.hi.u32", a, b), lanes([int(x) * int(y) >> 32 for x, y in zip(a, b, strict=True)])
    )
    np.testing.assert_array_equal(
        of("mad.lo.s32", a, b, c), lanes([x * y + z for x, y, z in zip(wide, others, signed(c), strict=True)])
    )
    long = of("mad.wide.s32", a, b, c.astype(np.uint64))
    np.testing.assert_array_equal(
        long, lanes([x * y + int(z) for x, y, z in zip(wide, others, c, strict=True)], np.uint64)
    )
    quotients = [abs(x) // abs(y) * (-1 if (x < 0) != (y < 0) else 1) for x, y in zip(wide, others, strict=True)]
    np.testing.assert_array_equal(of("div.s32", a, b), lanes(quotients))
    np.testing.assert_array_equal(
        of("rem.s32", a, b), lanes([x - q * y for x, y, q in zip(wide, others, quotients, strict=True)])
    )
    shift = b % np.uint32(40)  # more than there are bits, too
    np.testing.assert_array_equal(
        of("shl.b32", a, shift), lanes([int(x) << int(n) for x, n in zip(a, shift, strict=True)])
    )
    np.testing.assert_array_equal(
        of("shr.u32", a, shift), lanes([int(x) >> int(n) for x, n in zip(a, shift, strict=True)])
    )
    np.testing.assert_array_equal(
        of("shr.s32", a, shift), lanes([x >> int(n) for x, n in zip(wide, shift, strict=True)])
    )
    start, length = np.full(32, 5, np.uint32), np.full(32, 7, np.uint32)
    fields = [int(x) >> 5 & 127 for x in a]
    np.testing.assert_array_equal(of("bfe.u32", a, start, length), lanes(fields))
    np.testing.assert_array_equal(of("bfe.s32", a, start, length), lanes([f - 128 * (f >> 6) for f in fields]))
    chosen = [
        int.from_bytes([(int(x) | int(y) << 32) >> 8 * i & 255 for i in (7, 0, 4, 3)], "little")
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_array_equal(of("prmt.b32", a, b, np.full(32, 0x3407, np.uint32)), lanes(chosen))
    np.testing.assert_array_equal(of("setp.lt.s32", a, b), [x < y for x, y in zip(wide, others, strict=True)])
    pairs = [(int(x) + int(y) & 0xFFFF) | ((int(x) >> 16) + (int(y) >> 16) << 16) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(of("add.s16x2", a, b), lanes(pairs))


def as_torch(x: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(x.view(np.int16 if x.itemsize == 2 else np.int32)).view(dtype)


def same(found: Any, expected: torch.Tensor) -> None:
    """Bit by bit, of NaN any."""
    got = as_torch(found, expected.dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[~got.isnan()], expected[~expected.isnan()])


def test_floats_are_those_of_torch(bits):
    a, b = bits(np.uint32), bits(np.uint32)
    x, y = as_torch(a, torch.float32), as_torch(b, torch.float32)
    same(of("add.f32", a, b), x + y)
    same(of("mul.f32", a, b), x * y)
    same(of("cvt.rn.bf16.f32", a), x.bfloat16())
    same(of("cvt.rn.f16.f32", a), x.half())
    halves = bits(np.uint16)
    same(of("cvt.f32.f16", halves), as_torch(halves, torch.float16).float())
    same(of("cvt.f32.bf16", halves), as_torch(halves, torch.bfloat16).float())
    pairs = of("cvt.rn.bf16x2.f32", a, b).view(np.uint16).reshape(32, 2)
    same(np.ascontiguousarray(pairs[:, 1]), x.bfloat16())  # the first operand is the upper half
    same(np.ascontiguousarray(pairs[:, 0]), y.bfloat16())
    low, high = of("setp.gt.f16x2", a, b)
    ours, theirs = as_torch(a, torch.float16).view(32, 2), as_torch(b, torch.float16).view(32, 2)
    assert torch.equal(torch.from_numpy(np.stack([low, high], 1)), ours > theirs)
    same(of("max.f32", a, b), torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.maximum(x, y))))
    same(of("max.NaN.f32", a, b), torch.maximum(x, y))


def test_tf32_is_the_nearest_of_10_bits(bits):
    a = bits(np.uint32)
    x, rounded = as_torch(a, torch.float32), as_torch(of("cvt.rna.tf32.f32", a), torch.float32)
    assert torch.equal(x.isnan(), rounded.isnan())
    finite = x.isfinite() & rounded.isfinite() & (x.abs() > 2.0**-126)
    fraction, exponent = torch.frexp(x[finite].double())
    assert torch.equal(
        rounded[finite].double(),
        torch.ldexp((fraction.abs() * 2**11 + 0.5).floor() / 2**11, exponent) * fraction.sign(),
    )


@pytest.mark.parametrize("kind, dtype", [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_product_of_a_warp(kind, dtype, seed):
    """Of registers as the PTX ISA pictures them, element by element."""
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    pair = lambda low, high: int.from_bytes(torch.stack([low, high]).view(torch.uint8).numpy().tobytes(), "little")
    registers = lambda count, element: [
        lanes([element(i, lane // 4, lane % 4) for lane in range(32)]) for i in range(count)
    ]
    of_a = registers(4, lambda i, g, t: pair(*a[g + i % 2 * 8, 2 * t + i // 2 * 8 :][:2]))
    of_b = registers(2, lambda i, g, t: pair(*b[2 * t + i * 8 :, g][:2]))
    of_c = registers(4, lambda i, g, t: int.from_bytes(c[g + i // 2 * 8, 2 * t + i % 2].numpy().tobytes(), "little"))
    found = multiplied("m16n8k16", kind, of_a, of_b, of_c)
    expected = registers(
        4, lambda i, g, t: int((a.float() @ b.float() + c)[g + i // 2 * 8, 2 * t + i % 2].view(torch.int32))
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(as_torch(ours, torch.float32), as_torch(theirs, torch.float32), rtol=1e-5, atol=1e-5)


def test_a_swizzle_exchanges_units_by_their_line():
    """The 128-byte one, as CUTLASS has it: Swizzle<3, 4, 3>."""
    places = np.arange(0, 2048, 16)
    moved = swizzled(places, 3)
    assert sorted(moved) == list(places) and np.array_equal(moved // 128, places // 128)
    assert all(m // 16 % 8 == p // 16 % 8 ^ p // 128 % 8 for p, m in zip(places, moved, strict=True))
    assert np.array_equal(swizzled(places, 0), places)


PROGRAM = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .u64 kernel_param_0,
    .param .align 64 .b8 kernel_param_1[128]
)
.reqntid 64
{{
    .reg .pred %p<9>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    mov.b64 %rd2, kernel_param_1;
    mov.u32 %r1, %tid.x;
    mov.b32 %r2, global_smem;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r2, %r3;          // the thread's four bytes
    xor.b32 %r5, %r3, 128;
    add.s32 %r6, %r2, %r5;          // those of the other warp's
    setp.eq.b32 %p1, %r1, 0;
    setp.lt.u32 %p2, %r1, 32;
    cvt.u64.u32 %rd3, %r3;
    add.s64 %rd4, %rd1, %rd3;
    mov.b32 %r7, 0;
{body}
    ret;
}}
"""
EXCHANGE = """
    st.shared.b32 [%r4], %r1;
    {between}
    ld.shared.b32 %r8, [%r6];
    st.global.b32 [%rd4], %r8;
"""
ARRIVE_AND_WAIT = """
    @%p1 mbarrier.init.shared::cta.b64 [%r2+1024], {count};
    bar.sync 0;
    mbarrier.arrive.shared::cta.b64 _, [%r2+1024];
{{
    .reg .pred done;
    again:
    mbarrier.try_wait.parity.shared::cta.b64 done, [%r2+1024], {parity};
    @!done bra.uni again;
}}
"""
LOAD_A_BOX = """
    @%p1 mbarrier.init.shared::cta.b64 [%r2+1024], 1;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2+1024], {bytes};
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
        [%r2], [%rd2, {{%r7, %r7}}], [%r2+1024];
{{
    .reg .pred done;
    again:
    mbarrier.try_wait.parity.shared::cta.b64 done, [%r2+1024], {parity};
    @!done bra.uni again;
}}
    ld.shared.b32 %r8, [%r4];
    st.global.b32 [%rd4], %r8;
"""
STORE_A_BOX = """
    st.shared.b32 [%r4], %r1;
    {fence}
    bar.sync 0;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd2, {{%r7, %r7}}], [%r2];
    cp.async.bulk.commit_group;
    {wait}
"""
READ = "cp.async.bulk.wait_group.read 0;"


def launch(body: str, seed: int, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """64 threads of it on 64 integers, poisoned, and the descriptor of (rows, 8) others; both afterwards."""
    y, other = torch.full((64,), -1, dtype=torch.int32), torch.arange(rows * 8, dtype=torch.int32).view(rows, 8)
    box = TensorMap(other.data_ptr(), (rows, 8), (32, 4), (8, 8), 4, 0)
    ptx, arguments, dependent = PROGRAM.format(body=body), [y.data_ptr(), box], "griddepcontrol" in body
    one = {"grid": (1, 1, 1), "threads": 64, "shared": 2048, "dependent": dependent}
    run(Launch("test", ptx, arguments, **one, tensors=[y, other]), seed)
    return y, other


@pytest.mark.parametrize(
    "between", ["bar.sync 0;", ARRIVE_AND_WAIT.format(count=64, parity=0)], ids=["bar", "mbarrier"]
)
def test_warps_exchange_what_they_wrote(between, seed):
    assert launch(EXCHANGE.format(between=between), seed)[0].tolist() == [i ^ 32 for i in range(64)]


def test_a_box_comes_with_zeros_around(seed):
    y, other = launch(LOAD_A_BOX.format(bytes=256, parity=0), seed, rows=5)
    assert y.tolist() == [*other.flatten().tolist(), *[0] * 24]


def test_a_box_is_stored_where_the_tensor_is(seed):
    _, other = launch(STORE_A_BOX.format(fence="fence.proxy.async.shared::cta;", wait=READ), seed, rows=5)
    assert other.flatten().tolist() == list(range(40))


# What is wrong, and what is said of it; on whatever order.
WRONG = {
    "no-barrier": (EXCHANGE.format(between=""), "race: .* reads what .* writes|nobody wrote"),
    "a-barrier-of-one-warp": (EXCHANGE.format(between="bar.sync 0, 32;"), "race|nobody wrote"),
    "the-phase-before": (
        EXCHANGE.format(between=ARRIVE_AND_WAIT.format(count=64, parity=1)),
        "race|nobody wrote|deadlock",
    ),
    "too-few-arrivals": (EXCHANGE.format(between=ARRIVE_AND_WAIT.format(count=65, parity=0)), "deadlock"),
    "too-many-arrivals": (EXCHANGE.format(between=ARRIVE_AND_WAIT.format(count=33, parity=0)), "more arrivals|race"),
    "a-warp-left-alone": ("@%p2 bra $end; bar.sync 0; $end:", "deadlock"),
    "a-box-not-waited-for": (LOAD_A_BOX.format(bytes=256, parity=1), "race|nobody wrote|deadlock"),
    "more-bytes-expected": (LOAD_A_BOX.format(bytes=272, parity=0), "deadlock"),
    "a-store-nobody-waits-for": (STORE_A_BOX.format(fence="fence.proxy.async;", wait=""), "nobody waited for"),
    "an-mbarrier-overwritten": (
        ARRIVE_AND_WAIT.format(count=64, parity=0) + "st.shared.b32 [%r2+1024], %r1;",
        "in which an mbarrier lies",
    ),
    "an-mbarrier-used-at-once": (
        ARRIVE_AND_WAIT.format(count=64, parity=0).replace("bar.sync 0;", ""),
        "no mbarrier|an mbarrier that .* initialises",
    ),
    "half-aligned": ("ld.shared.v2.b32 {%r8, %r9}, [%r4+4];", "not aligned"),
    "a-barrier-of-33": ("bar.sync 0, 33;", "multiples of 32"),
    "a-barrier-of-some-lanes": ("setp.lt.u32 %p3, %r1, 5; @%p3 bar.sync 0;", "not all lanes"),
    "no-fence": (STORE_A_BOX.format(fence="", wait=READ), "race: .* reads what .* writes"),
    "beyond-a-tensor": ("add.s64 %rd4, %rd4, 4; st.global.b32 [%rd4], %r1;", "belongs to no tensor"),
    "half-an-address": ("add.s64 %rd4, %rd4, 2; ld.global.b32 %r8, [%rd4];", "not aligned"),
    "beyond-shared-memory": ("ld.shared.b32 %r8, [%r4+4096];", "is not the block's"),
    "never-written": ("ld.shared.b32 %r8, [%r4];", "nobody wrote"),
    "before-the-launch-before": ("st.global.b32 [%rd4], %r1; griddepcontrol.wait;", "before griddepcontrol.wait"),
    "lanes-apart": ("setp.lt.u32 %p3, %r1, 5; @%p3 bra $end; $end:", "lanes of a warp differ"),
    "more-registers-than-a-thread-has": ("setmaxnreg.inc.sync.aligned.u32 264;", "setmaxnreg.inc from"),
    "fewer-registers-by-inc": ("setmaxnreg.inc.sync.aligned.u32 24;", "setmaxnreg.inc from"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_found(wrong, seed):
    body, said = WRONG[wrong]
    for order in range(5):
        with pytest.raises(Fault, match=said):
            launch(body.replace("; ", ";\n").replace("$end:", "\n$end:\n"), seed + order)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"strides": (36, 4)}, "strides that divide by 16"),
        ({"box": (512, 8)}, "at most 256"),
        ({"address": 8}, "divides by 16"),
        ({"box": (8, 64), "shape": (8, 64), "strides": (256, 4), "swizzle": 3}, "at most 128 bytes inside"),
        ({"strides": (32, 8)}, "without gaps"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_descriptor_that_the_driver_would_refuse(changed, said):
    fields: dict[str, Any] = {
        "address": 0,
        "shape": (8, 8),
        "strides": (32, 4),
        "box": (8, 8),
        "itemsize": 4,
        "swizzle": 0,
    }
    with pytest.raises(Fault, match=said):
        TensorMap(**fields | changed)


@pytest.mark.parametrize(
    "instruction",
    [
        "popc.b32 %r8, %r1;", "add.sat.s32 %r8, %r1, %r1;", "cvt.rz.f16.f32 %r8, %r1;", "bar.arrive 0, 64;",
        "fence.acq_rel.cta;", "mbarrier.arrive.noComplete.shared::cta.b64 _, [%r2], 1;", "ld.shared.s16 %r8, [%r4];",
        "shfl.sync.bfly.b32 %r8|%p1, %r1, 16, 31, -1;", "@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r8}, [%r2];",
    ],
)  # fmt: skip
def test_what_is_not_known_is_said(instruction, seed):
    with pytest.raises(NotImplementedError):
        launch(instruction, seed)
