"""Every launch configuration that may be chosen, not only the one that is, against the reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..config import UNetConfig
from ..kernels import tuning
from .launches import Commuted, Config, Launch, Make, gradients, launches, with_moments
from .measures import distance
from .repeatability import poisoned_memory, same
from .report import Comparison, Errors
from .rule import Parity, compare, tf32_convolutions, truncating_stages


def check_configs(
    config: UNetConfig,
    size: tuple[int, int, int],
    device: str,
    dtype: torch.dtype,
    seed: int,
    *,
    share: tuple[int, int] = (0, 1),
    on_try: Callable[[str], None] = lambda text: None,
) -> Iterator[Comparison]:
    """Each layer of a network, forward and backward, under each configuration its launchers may choose on ``device``.

    Args:
        size: (batch, height, width).
        seed: of the random tensors.
        share: (rank, count) of a process among those that check every ``count``-th each.
        on_try: called with the name of each before it is launched: who hangs says nothing afterwards.

    Returns:
        Comparisons of kind ``"config"``, one at a time; of a kernel with a pooled result, of both
        results together. float32 is checked in tf32 and in full.
    """
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int, fan_in: int = 1) -> Tensor:
        # The strides that the operators give their results, also where sizes of 1 leave a choice.
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        values = torch.randn(shape, generator=generator) / fan_in**0.5
        return torch.empty(shape, dtype=dtype, device=device, memory_format=layout).copy_(values)

    capability, turn = tuning.capability(torch.device(device)), itertools.count()
    for tf32 in (True, False) if dtype == torch.float32 else (True,):
        rounds = tf32 and dtype == torch.float32 and device != "cpu"  # the interpreter does not
        for launch in _both_passes(config, size, make, tf32):
            if not tf32 and "tf32" not in launch.options:
                continue  # a pass over memory is the same in either case
            # Gluon has no interpreter; tests/hopper/ has an emulator.
            on_hopper = device != "cpu" and capability == tuning.HOPPER
            hopper = launch.hopper if on_hopper else ()
            for choice in (*launch.configs(capability), *hopper, *launch.commuted(on_hopper)):
                if next(turn) % share[1] != share[0]:
                    continue
                text = "its only configuration" if choice is None else str(choice)
                text += f", {'tf32' if tf32 else 'ieee'}" * (dtype == torch.float32 and "tf32" in launch.options)
                on_try(f"{launch.name}, {text}")
                yield _check_config(launch, choice, text, tf32, rounds and "tf32" in launch.options)


def _both_passes(config: UNetConfig, size: tuple[int, int, int], make: Make, tf32: bool) -> Iterator[Launch]:
    forward, training = (launches(config, size, make, tf32=tf32, training=training) for training in (False, True))
    for launch, trained in itertools.zip_longest(forward, training):
        yield launch
        if trained is None:  # a head in the same pass, which a backward pass does without
            continue
        if (trained.launcher, trained.options) != (launch.launcher, launch.options):
            yield trained
        yield from with_moments(trained)
        yield from gradients(trained, make, tf32=tf32)


def _check_config(launch: Launch, choice: Config | Commuted | None, text: str, tf32: bool, rounds: bool) -> Comparison:
    """One configuration, over memory filled with NaN, and once more: the same to the bit.

    Args:
        tf32: whether PyTorch's convolutions may round to tf32. rounds: whether the kernel does.
    """

    def broken(reason: str) -> Comparison:
        unknown = Errors(math.inf, math.inf, math.inf)
        parity = Parity(False, math.inf, math.inf, 0.0, reason)
        return Comparison("config", launch.name, text, parity, unknown, unknown)

    try:
        with tf32_convolutions(tf32):
            baseline = _flat(launch.function(*launch.tensors))
        truth = _flat(launch.function(*(t.double() for t in launch.tensors)))
        with poisoned_memory():
            first, second = launch.run(choice), launch.run(choice)
            result, again = _flat(first), _flat(second)
    except Exception as error:  # too much shared memory, say: the other configurations go on
        return broken(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    repeated = same("", {"result": result}, {"result": again})
    if not repeated.ok:
        return broken(f"a second run is another: {repeated.detail}")
    compared, problem = launch.split(first)
    if problem:
        return broken(problem)
    result = _flat(compared)
    interpreted = not result.is_cuda
    terms = 0.0
    if launch.summed is not None:
        summed = launch.summed(*(t.double() for t in launch.tensors))
        terms = summed.square().sum((0, 2, 3)).sqrt().max().item()
    stages = truncating_stages(2 if launch.layer.op == "conv2d_relu_head" else 1, result.dtype, interpreted)
    parity = compare(result, baseline, truth, tf32=rounds, stages=stages, terms=terms)
    return Comparison("config", launch.name, text, parity, distance(result, truth), distance(baseline, truth))


def _flat(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.flatten() for t in (result if isinstance(result, tuple) else (result,))])
