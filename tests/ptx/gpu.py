"""A driver of a GPU for Triton, whose own launchers ask a library that stands in for libcuda.

What they tell it, of descriptors and of launches, is what a GPU would be told.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from benchmarks.sass import StandInDriver

from .memory import TensorMap
from .program import parse

_ITEMSIZES = {6: 2, 7: 4, 9: 2, 11: 4}  # of CUtensorMapDataType: float16, float32, bfloat16, tfloat32
_TFLOAT32 = 11
_MAP = struct.Struct("<8s8xQ5I5Q5H4B")  # Triton itself writes to bytes 8 to 15 of a descriptor
_MAGIC = b"fastunet"
_Sizes, _Counts, _Word = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint
_ENCODE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_uint64,
    _Sizes, _Sizes, _Counts, _Counts, ctypes.c_int, ctypes.c_int, ctypes.c_int,
)  # fmt: skip
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_uint64, _Word, _Word, _Word, _Word, _Word,
    ctypes.c_uint64, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


class Launch(NamedTuple):
    """What ``cuLaunchKernelEx`` was called with."""

    name: str
    ptx: str
    arguments: list[int | TensorMap]  # numbers as their bits
    grid: tuple[int, int, int]
    threads: int
    shared: int  # bytes
    dependent: bool  # it may begin before the launch before it has ended
    tensors: list[Tensor]  # whose memory it may touch


# Of each kernel, by what the library calls it: name, PTX, bytes of each parameter. Triton loads a kernel once.
_loaded: dict[int, tuple[str, str, list[int]]] = {}
_folder = tempfile.TemporaryDirectory(prefix="fastunet-libcuda-")  # Triton 3.6 compiles each launcher against it


class Gpu(StandInDriver):
    """A driver that calls ``launch`` with each launch, before Triton's launcher returns."""

    def __init__(self, launch: Callable[[Launch], None]) -> None:
        super().__init__(90)
        self._launch = launch
        self._library, self.utils = _opened()
        self._callbacks = _ENCODE(self._encode), _LAUNCH(self._launched)
        self._tensors: list[Tensor] = []
        self._failure: BaseException | None = None
        self.launcher_cls = _Launcher

    def launching(self, launcher: Callable[..., None], given: Sequence[Any]) -> None:
        """A call of Triton's launcher."""
        bases = [getattr(value, "base", value) for value in given]
        self._tensors, self._failure = [value for value in bases if isinstance(value, Tensor)], None
        self._library.stand_in(*self._callbacks)
        try:
            launcher(*given)
        except RuntimeError:
            if self._failure is None:
                raise
        if self._failure is not None:  # of which the launcher knew that it was one
            raise self._failure

    def _result(self, call: Callable[..., None], *arguments: Any) -> int:
        try:
            call(*arguments)
        except BaseException as failure:  # which ctypes would print and forget
            self._failure = failure
        return int(self._failure is not None)

    def _encode(self, *arguments: Any) -> int:
        return self._result(_encode, *arguments)

    def _launched(self, *arguments: Any) -> int:
        return self._result(self._launch_of, *arguments)

    def _launch_of(
        self, function: int, x: int, y: int, z: int, threads: int, shared: int, stream: int, dependent: int, values: Any
    ) -> None:
        name, ptx, sizes = _loaded[function]
        raw = [ctypes.string_at(values[i], size) for i, size in enumerate(sizes)]
        arguments = [_decoded(value) if len(value) == 128 else int.from_bytes(value, "little") for value in raw]
        self._launch(Launch(name, ptx, arguments, (x, y, z), threads, shared, bool(dependent), self._tensors))


class _Launcher(nvidia.CudaLauncher):
    """Of a kernel for good, whichever driver is the active one when it is called."""

    def __call__(self, *given: Any) -> None:
        gpu: Any = driver.active
        gpu.launching(super().__call__, given)


def _encode(
    map_: int, kind: int, rank: int, address: int, sizes: Any, strides: Any, box: Any, steps: Any, interleave: int,
    swizzle: int, fill: int,
) -> None:  # fmt: skip
    if kind not in _ITEMSIZES or interleave or fill or set(steps[:rank]) != {1}:
        raise NotImplementedError(f"a descriptor of kind {kind}, interleaved {interleave}, filled with {fill}")
    shape, box = tuple(sizes[:rank][::-1]), tuple(box[:rank][::-1])
    itemsize = _ITEMSIZES[kind]
    tensor = TensorMap(
        address, shape, (*strides[: rank - 1][::-1], itemsize), box, itemsize, swizzle, rounds=kind == _TFLOAT32
    )
    pad = [0] * (5 - rank)
    fields = address, *shape, *pad, *tensor.strides, *pad, *box, *pad, rank, itemsize, swizzle, tensor.rounds
    ctypes.memmove(map_, _MAP.pack(_MAGIC, *fields), _MAP.size)


def _decoded(descriptor: bytes) -> TensorMap:
    magic, address, *fields = _MAP.unpack_from(descriptor)
    if magic != _MAGIC:
        raise AssertionError("a descriptor that cuTensorMapEncodeTiled did not write")
    *axes, rank, itemsize, swizzle, rounds = fields
    shape, strides, box = (tuple(axes[first : first + rank]) for first in (0, 5, 10))
    return TensorMap(address, shape, strides, box, itemsize, swizzle, bool(rounds))


@functools.cache
def _opened() -> tuple[ctypes.CDLL, Any]:
    """The library, and Triton's own module, which calls it."""
    path = Path(_folder.name) / "libcuda.so.1"
    include = Path(nvidia.__file__).parent / "include"
    source = Path(__file__).with_name("libcuda.c")
    command = ["cc", "-shared", "-fPIC", "-w", f"-I{include}", source, "-o", path, f"-Wl,-soname,{path.name}"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # and found by its name from now on
    with knobs.nvidia.scope():
        knobs.nvidia.libcuda_path = _folder.name
        utils = nvidia.CudaUtils()
    knobs.runtime.kernel_load_end_hook.add(_note)
    return library, utils


def _note(module: Any, function: Any, name: str, metadata_group: dict[str, str], hash: str) -> None:
    ptx = Path(metadata_group[f"{name}.ptx"]).read_text()
    _loaded[function] = name, ptx, [size for _, size in parse(ptx).parameters]
