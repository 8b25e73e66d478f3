"""What Triton 3.6 to 3.9 call the same operations of Gluon, in one place."""

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

# Renamed in 3.8; the old names warn.
tma_load = gl.constexpr(getattr(tma, "async_load", None) or tma.async_copy_global_to_shared)
tma_store = gl.constexpr(getattr(tma, "async_store", None) or tma.async_copy_shared_to_global)
tma_store_wait = gl.constexpr(tma.store_wait)

# Before that a view could be reinterpreted as a larger one, so that windows may overlap; since then it is
# checked, and the kernels do without (HopperConfig.halo).
OVERLAPPING_WINDOWS = not hasattr(gl.shared_memory_descriptor, "reinterpret")
_OLD_REINTERPRET = gl.constexpr(OVERLAPPING_WINDOWS)


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
    "TensorDescriptor",
    "fence_async_shared",
    "gdc_launch_dependents",
    "gdc_wait",
    "gl",
    "gluon",
    "mbarrier",
    "reinterpret",
    "tma_load",
    "tma_store",
    "tma_store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
