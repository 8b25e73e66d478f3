"""What Triton 3.6 to 3.9 call the same operations of Gluon, in one place."""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.jit import JITFunction

# Renamed in 3.8; the old names warn.
tma_load = gl.constexpr(getattr(tma, "async_load", None) or tma.async_copy_global_to_shared)
tma_store = gl.constexpr(getattr(tma, "async_store", None) or tma.async_copy_shared_to_global)
tma_store_wait = gl.constexpr(tma.store_wait)

# Before that a view could be reinterpreted as a larger one, so that windows may overlap; since then it is
# checked, and the kernels do without (HopperConfig.halo).
OVERLAPPING_WINDOWS = not hasattr(gl.shared_memory_descriptor, "reinterpret")
_OLD_REINTERPRET = gl.constexpr(OVERLAPPING_WINDOWS)

# Whether a descriptor may say that float32 is rounded to tf32 as it is loaded: since 3.7.
TMA_ROUNDS = hasattr(TensorDescriptor, "round_f32_to_tf32")
_TFLOAT32 = 11  # of CUtensorMapDataType


def make_loads_round(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any], loads: int
) -> None:
    """What ``TMA_ROUNDS`` says, of the first ``loads`` descriptors of a kernel that Triton 3.6 compiles.

    What a launch tells the driver of an element's type is in the compiled kernel's metadata; no cache of Triton's
    keeps what is changed there.
    """
    if not isinstance(kernel, JITFunction):
        return  # what stands in for one
    compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
    if compiled is not None:
        for described in compiled.metadata.tensordesc_meta[:loads]:
            described["elem_type"] = _TFLOAT32


@gluon.jit
def reinterpret(view, shape: gl.constexpr, layout: gl.constexpr):
    """The shared memory that begins with ``view``, in another shape."""
    if _OLD_REINTERPRET:
        other = view._reinterpret(view.dtype, shape, layout)
    else:
        other = view.reinterpret(view.dtype, shape, layout)
    return other


__all__ = [
    "OVERLAPPING_WINDOWS",
    "TMA_ROUNDS",
    "TensorDescriptor",
    "fence_async_shared",
    "gdc_launch_dependents",
    "gdc_wait",
    "gl",
    "gluon",
    "make_loads_round",
    "mbarrier",
    "reinterpret",
    "tma_load",
    "tma_store",
    "tma_store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
