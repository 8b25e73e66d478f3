"""CUDA graphs of a whole forward pass: captured once for each kind of input, replayed after that."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

from . import dispatch, ops
from .sources import Sources

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
        self.limit, self.outer = limit, outer
        self.captured: OrderedDict[Hashable, tuple[Run, Sources]] = OrderedDict()
        self.lock = threading.RLock()

    def clear(self) -> None:
        """Forget the graphs, of the blocks around this one too."""
        with self.lock:
            self.captured.clear()
        if self.outer is not None:
            self.outer.clear()

    def __call__(self, forward: Run, x: Tensor, sources: list[Tensor]) -> Tensor:
        """``forward(x)``, replayed where a graph can say the same.

        Args:
            sources: parameters and buffers that the forward pass reads; a change of one counts a version.
        """
        if not _capturable(x):
            return forward(x)
        key = _signature(x)
        with self.lock:
            run, made_from = self.captured.get(key, (None, None))
            if run is None or made_from is None or not made_from.are(sources):
                run = _capture(forward, x)
                self.captured[key] = run, Sources(sources)
            self.captured.move_to_end(key)
            while len(self.captured) > self.limit:
                self.captured.popitem(last=False)
            return run(x)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _capturable(x: Tensor) -> bool:
    if not _on_gpu(x) or torch.compiler.is_compiling():
        return False
    if torch.cuda.is_current_stream_capturing():  # the user's own capture takes the launches as they come
        return False
    return not (torch.is_grad_enabled() and x.requires_grad)


def _signature(x: Tensor) -> Hashable:
    """What a capture depends on beside the weights."""
    autocast = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type)
    return x.shape, x.stride(), x.dtype, x.device, autocast, ops.tf32(), dispatch.asked_for()


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
