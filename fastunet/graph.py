"""CUDA graphs of a whole forward pass: captured once for each kind of input, replayed after that."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import dispatch, ops

Run = Callable[[Tensor], Tensor]


@dataclass
class _Captured:
    """A graph and what it was captured from: it holds while every source is the same tensor, unchanged."""

    run: Run
    sources: list[tuple[Tensor, int]]

    def fresh(self, tensors: list[Tensor]) -> bool:
        return len(tensors) == len(self.sources) and all(
            t.data_ptr() == old.data_ptr() and t._version == version and t.dtype == old.dtype
            for t, (old, version) in zip(tensors, self.sources, strict=True)
        )


class Graphs:
    """Captured graphs of one model, by input signature; the least recently used of more than ``limit`` is dropped."""

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        self.limit = limit
        self.captured: OrderedDict[Hashable, _Captured] = OrderedDict()

    def __call__(self, forward: Run, x: Tensor, tensors: Iterable[Tensor]) -> Tensor:
        """``forward(x)``, replayed where a graph can say the same.

        Args:
            tensors: parameters and buffers that the forward pass reads.
        """
        sources = list(tensors)
        if not _capturable(x, sources):
            return forward(x)
        key = _signature(x)
        found = self.captured.get(key)
        if found is None or not found.fresh(sources):
            # Aliases keep the sources' memory alive, so that a new tensor cannot appear at an old address.
            aliases = [(t.detach(), t._version) for t in sources]
            found = self.captured[key] = _Captured(_capture(forward, x), aliases)
        self.captured.move_to_end(key)
        while len(self.captured) > self.limit:
            self.captured.popitem(last=False)
        return found.run(x)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _capturable(x: Tensor, sources: list[Tensor]) -> bool:
    if not _on_gpu(x) or torch.compiler.is_compiling():
        return False
    if torch.cuda.is_current_stream_capturing():  # the user's own capture takes the launches as they come
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *sources)):
        return False
    # An inference tensor has no version to tell by whether it changed.
    return not any(t.is_inference() for t in sources)


def _signature(x: Tensor) -> Hashable:
    """What a capture depends on beside the weights."""
    autocast = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type)
    return x.shape, x.stride(), x.dtype, x.device, autocast, ops.tf32(), dispatch.asked_for()


def _capture(forward: Run, x: Tensor) -> Run:
    """Capture ``forward`` on a copy of ``x``; the result copies in, replays, copies out."""
    with torch.cuda.device(x.device), torch.inference_mode(False), torch.no_grad():
        static = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        static.copy_(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles kernels and lays out weights, which a capture must not
            forward(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = forward(static)
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
