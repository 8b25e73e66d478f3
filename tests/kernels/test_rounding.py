"""What a GPU rounds, so does the interpreter that the tests run kernels in: to the nearest."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _copy_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, x.to(y_ptr.dtype.element_ty), mask=i < count)


def copied(x, dtype):
    y = torch.empty_like(x, dtype=dtype)
    options: Any = {"BLOCK": 4096}
    _copy_kernel[(triton.cdiv(x.numel(), 4096),)](x, y, x.numel(), **options)
    return y


def test_to_16_bits_as_torch(seed, device):
    """Any bits, ties, the largest numbers, those below the normal ones, infinities and NaN."""
    bits = torch.randint(-(2**31), 2**31, (20_000,), dtype=torch.int64)
    ties = (bits[:5_000] & ~0xFFFF) | 0x8000
    named = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45, 65519.9, 65520.0])
    x = torch.cat([torch.cat([bits, ties]).to(torch.int32).view(torch.float32), named]).to(device)
    for dtype in (torch.bfloat16, torch.float16):
        found, expected = copied(x, dtype), x.to(dtype)
        assert torch.equal(found.isnan(), expected.isnan())
        there = ~expected.isnan()
        assert torch.equal(found[there].view(torch.int16), expected[there].view(torch.int16))


def test_from_bfloat16_exactly(device):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(device)
    there = ~x.isnan()
    found = copied(x, torch.float32)
    assert torch.equal(found[there], x[there].float()) and bool(found[~there].isnan().all())
