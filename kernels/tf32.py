"""float32 rounded to tf32, to the nearest, before tensor cores see it.

Of a float32 factor they look at the upper 19 bits: they truncate. All factors are then too small, by a third of
tf32's eps (2^-10) on average, and so is every map, by twice that more from layer to layer; rounded, their errors have
no sign and grow as the root of the layers (benchmarks/NOTES.md). Pixels are rounded as TMA loads them, or in registers;
weights, which WGMMA wants straight from shared memory, beforehand. One factor of a weight's gradient stays truncated
(conv_bwd.py): it is not handed on.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import launch
from .tuning import FUSION

# Whether a descriptor may say that float32 is rounded as it is loaded: since Triton 3.7.
TMA_ROUNDS = hasattr(TensorDescriptor, "round_f32_to_tf32")
_TFLOAT32 = 11  # of CUtensorMapDataType
_BLOCK = 1024
_MARK = "rounded_to_tf32"


def rounds(dtype: torch.dtype, tf32: bool) -> bool:
    """Whether factors of this dtype are rounded; the interpreter's products are exact."""
    return tf32 and dtype == torch.float32 and not triton.knobs.runtime.interpret


@triton.jit
def rounded_to_tf32(x):
    """The nearest tf32, of ties the one away from 0, of float32; others as they are."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [bits], tl.int32, is_pure=True, pack=1)
        x = bits.to(tl.float32, bitcast=True)
    return x


def rounding(rounds: bool) -> dict[str, bool]:
    """Options of a descriptor of what is loaded; with Triton 3.6 :func:`launch_rounding` does it."""
    return {"round_f32_to_tf32": True} if rounds and TMA_ROUNDS else {}


def launch_rounding(loads: int, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``launch``; float32 that TMA loads by the first ``loads`` descriptors among the arguments is rounded.

    What a launch of Triton 3.6 tells the driver of an element's type is in the compiled kernel's metadata, which is
    changed here. All launches of a compiled kernel round or none does: it is compiled for tf32 or not.
    """
    if loads and not TMA_ROUNDS and isinstance(kernel, JITFunction):  # not what stands in for one
        compiled: Any = kernel.run(*arguments, grid=grid, warmup=True, **options)
        for described in compiled.metadata.tensordesc_meta[:loads] if compiled is not None else ():
            described["elem_type"] = _TFLOAT32
    launch(kernel, grid, *arguments, **options)


@triton.jit
def _round_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, rounded_to_tf32(tl.load(x_ptr + i, mask=i < n, other=0.0)), mask=i < n)


def rounded_weight(weight: Tensor, tf32: bool, of: Tensor | None = None) -> Tensor:
    """``weight``, without gaps, rounded where its products are in tf32 and ``of``, its elements, is not known to be."""
    if not rounds(weight.dtype, tf32) or is_rounded(weight if of is None else of):
        return weight
    y, n = torch.empty_like(weight), weight.numel()
    if n:
        launch(_round_kernel, (triton.cdiv(n, _BLOCK),), weight, y, n, BLOCK=_BLOCK, num_warps=4, **FUSION)
    return y


def marked_as_rounded(weight: Tensor, of: Tensor | None = None) -> Tensor:
    """``weight``, known to be rounded, or to be if ``of`` is, from which it is taken.

    As a Python object, and until it is written to: what is made of it otherwise is rounded once more, to the same.
    """
    if of is None or is_rounded(of):
        setattr(weight, _MARK, _version(weight))
    return weight


def is_rounded(weight: Tensor) -> bool:
    """Whether it is known to be."""
    version = getattr(weight, _MARK, None)
    return version is not None and version == _version(weight)


def _version(weight: Tensor) -> int:
    """How often it was written to; inference tensors, which do not tell, are ours alone."""
    return 0 if weight.is_inference() else weight._version
