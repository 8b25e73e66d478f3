"""CUDA graphs of a whole forward pass: captured once for each kind of input, replayed after that."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

from .ops.common import signature
from .ops.operator import someone_looks_on
from .sources import Kept

Run = Callable[[Tensor], Tensor]
Result = TypeVar("Result")

_ours: ContextVar[bool] = ContextVar("fastunet_capturing", default=False)


def in_a_users_capture(x: Tensor) -> bool:
    """Whether launches on ``x`` go into a CUDA graph that is not one of ours."""
    return _on_gpu(x) and torch.cuda.is_current_stream_capturing() and not _ours.get()


class Graphs:
    """Captured graphs of one model, by input signature; the least recently used of more than ``limit`` is dropped.

    Threads take turns: a graph has one input and one output.

    Args:
        outer: those of the block around this one's.
    """

    def __init__(self, limit: int, outer: Graphs | None = None) -> None:
        if limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        self.outer = outer
        self._captured: Kept[Run] = Kept(limit)
        self._turn = threading.RLock()

    def clear(self) -> None:
        """Forget the graphs, of the blocks around this one too."""
        self._captured.clear()
        if self.outer is not None:
            self.outer.clear()

    def __call__(self, forward: Run, x: Tensor, tensors: Sequence[Tensor], objects: Sequence[object]) -> Tensor:
        """``forward(x)``, replayed.

        Args:
            tensors: parameters and buffers that it reads; a change of one counts a version.
            objects: what else it depends on, if another takes its place.
        """
        key = signature(x)
        with self._turn:
            captured = self._captured.made_from(tensors, objects)
            run = captured.find(key)
            if run is None:
                run = _capture(forward, x)
                captured.keep(key, run)
            return run(x)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def repeats(x: Tensor) -> bool:
    """Whether a forward pass of ``x``, if its weights stay the same, is the same work again, and nobody looks on."""
    if not _on_gpu(x) or type(x) is not Tensor or someone_looks_on():
        return False
    if torch.cuda.is_current_stream_capturing():  # the user's own capture takes the launches as they come
        return False
    return x.numel() > 0 and not (torch.is_grad_enabled() and x.requires_grad)


def captured(call: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of ``call`` on the current device, which it ran on once before, and what its replays write to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles kernels and lays out weights, which a capture must not
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # On a stream of this device: the one by default is of the device that was captured on first. A capture that
    # fails does not leave it, and one in the usual mode would fail by what other threads allocate.
    with torch.cuda.stream(torch.cuda.current_stream()):
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            result = call()
    return graph, result


def _capture(forward: Run, x: Tensor) -> Run:
    """Capture ``forward`` on a copy of ``x``; the result copies in, replays, copies out."""
    with torch.cuda.device(x.device), torch.inference_mode(False), torch.no_grad():
        static = torch.empty_like(x)  # of x's strides, unless those let elements share memory
        static.copy_(x)
        token = _ours.set(True)
        try:
            graph, output = captured(lambda: forward(static))
        finally:
            _ours.reset(token)
        done = torch.cuda.Event()

    def run(x: Tensor) -> Tensor:
        with torch.cuda.device(x.device), torch.no_grad():
            stream = torch.cuda.current_stream()
            stream.wait_event(done)  # the replay before may be on another stream
            static.copy_(x)
            graph.replay()
            result = output.clone()  # the next replay writes over ``output``
            stream.record_event(done)
        return result

    return run
