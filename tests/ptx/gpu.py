"""A driver of a GPU for Triton, whose own launchers ask a library that stands in for libcuda.

What they tell it, of descriptors and of launches, is what a GPU would be told.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import subprocess
import tempfile
import threading
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


class Launch(NamedTuple):
    """What ``cuLaunchKernelEx`` was called with."""

    name: str
    ptx: str
    arguments: list[int | TensorMap]  # numbers as their bits
    grid: tuple[int, int, int]
    threads: int
    shared: int  # bytes
    dependent: bool  # it may begin before the launch before it has ended
    tensors: Sequence[Tensor]  # whose memory it may touch


_ITEMSIZES = {6: 2, 7: 4, 9: 2, 11: 4}  # of CUtensorMapDataType: float16, float32, bfloat16, tfloat32
_TFLOAT32 = 11
_STREAM = 7  # for every launch
_DESCRIPTOR = struct.Struct("<8s8xQ")  # a mark and a number; what is between Triton itself writes to
_MARK = b"fastunet"
_described: list[TensorMap] = []
# Of each kernel, by what the library calls it: name, PTX, bytes of each parameter. Triton loads a kernel once.
_loaded: dict[int, tuple[str, str, list[int]]] = {}
_folder = tempfile.TemporaryDirectory(prefix="fastunet-libcuda-")  # Triton 3.6 compiles each launcher against it


class _Call(threading.local):
    """The call of Triton's launcher that a thread is in."""

    tensors: Sequence[Tensor] = ()
    failure: BaseException | None = None


_call = _Call()


def _told(callback: Callable[..., None]) -> Callable[..., int]:
    """For C, which knows no exceptions."""

    def result(*arguments: Any) -> int:
        try:
            callback(*arguments)
        except BaseException as failure:
            _call.failure = failure
            return 1
        return 0

    return result


_Sizes, _Counts, _Word = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint


@ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_uint64,
    _Sizes, _Sizes, _Counts, _Counts, ctypes.c_int, ctypes.c_int, ctypes.c_int,
)  # fmt: skip
@_told
def _encode(
    to: int, kind: int, rank: int, address: int, sizes: Any, strides: Any, box: Any, steps: Any,
    interleave: int, swizzle: int, fill: int,
) -> None:  # fmt: skip
    if kind not in _ITEMSIZES or interleave or fill or set(steps[:rank]) != {1}:
        raise NotImplementedError(f"a descriptor of kind {kind}, interleaved {interleave}, filled with {fill}")
    itemsize, (shape, outer, boxes) = _ITEMSIZES[kind], (axes[:rank][::-1] for axes in (sizes, strides, box))
    lengths = (*outer[1:], itemsize)
    _described.append(TensorMap(address, tuple(shape), lengths, tuple(boxes), itemsize, swizzle, kind == _TFLOAT32))
    ctypes.memmove(to, _DESCRIPTOR.pack(_MARK, len(_described) - 1), _DESCRIPTOR.size)


@ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_uint64, _Word, _Word, _Word, _Word, _Word,
    ctypes.c_uint64, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
@_told
def _launch(
    function: int, x: int, y: int, z: int, threads: int, shared: int, stream: int, dependent: int, values: Any
) -> None:
    if stream != _STREAM:
        raise AssertionError(f"a launch on stream {stream}, not on the current one")
    name, ptx, sizes = _loaded[function]
    raw = [ctypes.string_at(values[i], size) for i, size in enumerate(sizes)]
    arguments = [_decoded(value) if len(value) == 128 else int.from_bytes(value, "little") for value in raw]
    gpu: Any = driver.active
    gpu.launch(Launch(name, ptx, arguments, (x, y, z), threads, shared, bool(dependent), _call.tensors))


def _decoded(descriptor: bytes) -> TensorMap:
    mark, number = _DESCRIPTOR.unpack_from(descriptor)
    if mark != _MARK:
        raise AssertionError("a descriptor that cuTensorMapEncodeTiled did not write")
    return _described[number]


def _note(module: Any, function: Any, name: str, metadata_group: dict[str, str], hash: str) -> None:
    """A kernel was loaded."""
    (path,) = (path for file, path in metadata_group.items() if file.endswith(".ptx"))
    ptx = Path(path).read_text()
    _loaded[function] = name, ptx, [size for _, size in parse(ptx).parameters]


@functools.cache
def _module() -> Any:
    """Triton's own, which calls the library."""
    path, include = Path(_folder.name) / "libcuda.so.1", Path(nvidia.__file__).parent / "include"
    source, compiler = Path(__file__).with_name("libcuda.c"), os.environ.get("CC", "cc")
    command = [compiler, "-shared", "-fPIC", f"-I{include}", source, "-o", path, f"-Wl,-soname,{path.name}"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(path))
    if ctypes.CDLL(path.name)._handle != library._handle:
        raise RuntimeError("this process has loaded a real driver's libcuda, which Triton would call")
    library.stand_in(_encode, _launch)
    knobs.runtime.kernel_load_end_hook.add(_note)
    with knobs.nvidia.scope():
        knobs.nvidia.libcuda_path = _folder.name
        return nvidia.CudaUtils()


class _Launcher(nvidia.CudaLauncher):
    """Of a kernel for good, whichever driver is the active one when it is called."""

    def __call__(self, *given: Any) -> None:
        bases = [getattr(value, "base", value) for value in given]
        _call.tensors, _call.failure = [value for value in bases if isinstance(value, Tensor)], None
        try:
            super().__call__(*given)
        except RuntimeError as told:
            raise _call.failure or told from None
        finally:  # nothing is held
            _call.tensors, _call.failure = (), None


class Gpu(StandInDriver):
    """A driver that calls ``launch`` with each launch, before Triton's launcher returns."""

    launcher_cls = _Launcher

    def __init__(self, launch: Callable[[Launch], None]) -> None:
        super().__init__(90)
        self.launch, self.utils = launch, _module()

    def get_current_stream(self, device: int) -> int:
        return _STREAM
