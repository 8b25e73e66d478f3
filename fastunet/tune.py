"""Time every implementation of each layer of a model on this GPU, and keep the fastest.

Opt-in, and ahead of time: a forward pass only ever looks up what was measured (:mod:`fastunet.measured`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import dispatch, measured
from .config import UNetConfig
from .files import atomic_write
from .graph import captured
from .measured import Entry
from .model import FastUNet
from .ops import tf32
from .ops.common import on_device, repeatable_cudnn, rounded, rounds_to_tf32
from .parity.rule import compare

if TYPE_CHECKING or dispatch.has_triton():
    from .parity.launches import Launch, gradients, launches

Timer = Callable[[Callable[[], Any]], float]


def tune(
    model: FastUNet, input_size: tuple[int, int, int, int], *, dtype: torch.dtype | None = None
) -> dict[str, Entry]:
    """Time each layer of ``model`` under each implementation, and keep the results in the user's cache.

    The next process, and this one from now on, takes the fastest; of CUDA graphs, those of ``model`` are forgotten.
    Minutes: each launch configuration is compiled.

    Args:
        model: on a CUDA device; in train mode its backward pass is timed too.
        input_size: (N, C, H, W) of the inputs to come.
        dtype: of the inputs; the model's own by default.

    Returns:
        What was measured, by :func:`fastunet.measured.layer_key`.

    Raises:
        ValueError: ``model`` or ``input_size`` is not one. RuntimeError: the kernels cannot run there.
    """
    if not isinstance(model, FastUNet):
        raise ValueError(f"model: expected a FastUNet, got {type(model).__name__}")
    parameter = next(model.parameters())
    device, dtype = parameter.device, dtype or parameter.dtype
    obstacle = dispatch.why_not_triton(device, dtype)
    if device.type != "cuda" or obstacle is not None:
        raise RuntimeError(f"model: there is nothing to tune: {obstacle or 'the device is no GPU'}")
    n, _, h, w = input_size
    entries = dict(measure(model.config, (n, h, w), dtype, device, training=model.training))
    save(measured.cache_path(device), device, entries)
    model.refresh()
    return entries


def measure(
    config: UNetConfig,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer | None = None,
    deadline: float = float("inf"),
    training: bool = False,
    on_try: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[str, Entry]]:
    """The key of each layer's steps and what was fastest for it, one at a time.

    Args:
        size: (batch, height, width).
        timer: microseconds of a call; by default the median of repeated ones, captured, L2 flushed before each.
        deadline: of :func:`time.monotonic`; after it no other step is begun.
        training: the steps of a training step, backward as well, instead of an inference's.
        on_try: called with the name of each candidate before it is launched.
    """

    def make(*shape: int, fan_in: int = 1) -> torch.Tensor:
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        # Random numbers: on zeros a GPU draws less power and is faster.
        return torch.randn(shape, device=device, dtype=dtype).div_(fan_in**0.5).to(memory_format=layout)

    seen: set[str] = set()
    for launch in launches(config, size, make, tf32=tf32(), training=training):
        launch = launch if training else _as_kept(launch)
        steps = {"forward": [launch]}
        for gradient in gradients(launch, make, tf32=tf32()) if training else ():
            if gradient.step:
                steps.setdefault(gradient.step, []).append(gradient)  # of two sources, one each
        for step, parts in steps.items():
            key = key_of(launch, step)
            if key not in seen and time.monotonic() < deadline:
                seen.add(key)
                with on_device(launch.tensors[0]):
                    entry = _fastest(parts, device, timer or _median, on_try)
                yield key, entry


def _as_kept(launch: Launch) -> Launch:
    """With the weight as a model keeps it for inference: rounded where products are in tf32."""
    *maps, weight = launch.tensors[: len(launch.layer.in_shapes) + 1]
    if not rounds_to_tf32(weight.device, weight.dtype):
        return launch
    return dataclasses.replace(launch, tensors=(*maps, rounded(weight), *launch.tensors[len(maps) + 1 :]))


def key_of(launch: Launch, step: str = "forward") -> str:
    """:func:`fastunet.measured.layer_key` of a forward launch, or of another step of its layer."""
    layer = launch.layer
    *maps, weight, bias = launch.tensors[: len(layer.in_shapes) + 2]
    classes = len(launch.tensors[-2]) if layer.op == "conv2d_relu_head" else 0
    of = [x.shape for x in maps], weight.shape, weight.dtype, layer.mode, step, layer.geometry, classes, bias.dim() == 2
    return measured.layer_key(layer.op, *of)


def _fastest(parts: list[Launch], device: torch.device, timer: Timer, on_try: Callable[[str], None]) -> Entry:
    """Of a step that takes these launches, one after another."""
    times = [_times(part, device, timer, on_try) for part in parts]
    total = {name: sum(t[name][0] for t in times) for name in times[0] if all(name in t for t in times)}
    if not total:
        raise RuntimeError(f"{parts[0].name}: no implementation can run")
    name = min(total, key=lambda name: total[name])
    config = times[0][name][1]
    microseconds = {name: round(taken, 2) for name, taken in total.items()}
    return Entry(name, microseconds, None if config is None else dataclasses.asdict(config))


def _times(
    launch: Launch, device: torch.device, timer: Timer, on_try: Callable[[str], None]
) -> dict[str, tuple[float, Any]]:
    """Microseconds and launch configuration of each implementation that is right, and gradients the same twice."""
    on_hopper = dispatch.why_not_hopper(device) is None
    hopper = launch.hopper if on_hopper else ()
    candidates: list[tuple[str, Any, Callable[[], Any]]] = [
        ("triton", None, launch.run),
        ("torch", None, lambda: launch.function(*launch.tensors)),
        *(("hopper", config, lambda config=config: launch.run(config)) for config in hopper),
        *((name, None, lambda name=name: launch.run(name)) for name in launch.commuted(on_hopper)),
    ]
    truth = _all(launch.function(*(t.double() for t in launch.tensors)))
    baseline = _all(launch.function(*launch.tensors))
    tf32_counts = baseline[0].dtype == torch.float32 and tf32()
    times: dict[str, tuple[float, Any]] = {}
    for name, config, call in candidates:
        on_try(f"{launch.name}, {name}, {config}")
        try:
            with repeatable_cudnn() if launch.gradient else contextlib.nullcontext():
                results = _all(call())
                parities = [
                    compare(*tensors, tf32=tf32_counts) for tensors in zip(results, baseline, truth, strict=True)
                ]
                problem = next((str(parity) for parity in parities if not parity.ok), "")
                if launch.gradient and not problem and not all(map(torch.equal, results, _all(call()))):
                    problem = "another result the second time"
                taken = math.inf if problem else timer(call)
        except Exception as error:  # too much shared memory, say: the others go on
            problem, taken = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", math.inf
        if problem:
            warnings.warn(f"{launch.name}, {name}, {config}: left out: {problem}", stacklevel=2)
        elif name not in times or taken < times[name][0]:
            times[name] = taken, None if launch.gradient else config  # of two sources each launch has its own
    return times


def save(path: Path, device: torch.device, entries: dict[str, Entry]) -> None:
    """Add ``entries`` to the table at ``path``; one that is not for this machine is replaced."""
    versions = measured.versions(device)
    try:
        before = measured.read(path, versions)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        before = {}
    layers = {key: dataclasses.asdict(entry) for key, entry in sorted({**before, **entries}.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({"measured_on": versions, "layers": layers}, indent=1) + "\n", encoding="utf-8")
    measured.table.cache_clear()


def _median(call: Callable[[], Any]) -> float:
    """Of replays: a launch from Python takes a host longer than a small layer takes a GPU."""
    from triton.testing import do_bench

    graph, _ = captured(call)
    milliseconds: Any = do_bench(graph.replay, warmup=5, rep=20, return_mode="median")
    return 1000 * milliseconds


def _all(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
