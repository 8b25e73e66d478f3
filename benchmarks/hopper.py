"""On a Hopper GPU: are the Hopper kernels right, what are they worth, and the table that follows from it.

    python benchmarks/hopper.py                    # parity, then timing, then fastunet/tables/<device>.json
    python benchmarks/hopper.py --skip-parity --budget 200 --size 16x256x256 --dtype bf16

1. Parity of every launch configuration of every layer of the seed's network, also of an odd size, twice each
   and over poisoned memory (``fastunet verify --all-configs`` does the same).
2. The time of every layer under the Hopper, the portable and cuDNN's kernels, which several processes compile
   first; each result is compared by the parity rule before it is timed.
3. The table, written after each layer, so that a run that is cut off leaves what it had.

Exits 1 if a configuration breaks the rule. Prints a line a layer; TFLOP/s are those of the fastest.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from queue import Empty
from typing import Any

import torch

from fastunet import dispatch, kernels, measured
from fastunet.config import UNetConfig
from fastunet.parity.configs import check_configs
from fastunet.parity.launches import launches
from fastunet.tune import key_of, measure, save

WORKERS = min(16, os.cpu_count() or 1)  # each with its own context and maps in the GPU's memory
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}


_WITH_HEAD = (1, 64, 34, 48), (64, 64, 3, 3), (2, 64, 1, 1)  # x, weight, head

Say = Callable[[str, bool | None], None]


def check_share(rank: int, count: int, dtype: torch.dtype, say: Say) -> None:
    """Check every ``count``-th configuration; say each one's name with None before, a line and if it held after."""
    what = UNetConfig(), kernels.hopper.PARITY_SIZE, "cuda", dtype
    for comparison in check_configs(*what, seed=0, share=(rank, count), on_try=lambda text: say(text, None)):
        say(f"{comparison.name}, {comparison.implementation}: {comparison.parity}", comparison.parity.ok)


def compile_share(
    sizes: Sequence[tuple[int, int, int]], device: str, rank: int, count: int, dtype: torch.dtype, say: Say
) -> None:
    """Launch every ``count``-th candidate of what will be timed, for Triton's cache; say as :func:`check_share`."""

    def make(*shape: int, fan_in: int = 1) -> torch.Tensor:
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device=device, memory_format=layout)

    on_hopper, turn = dispatch.why_not_hopper(torch.device(device)) is None, itertools.count()
    for size in sizes:
        for launch in launches(UNetConfig(), size, make):
            for config in (None, *(launch.hopper if on_hopper else ()), *launch.commuted(on_hopper)):
                if next(turn) % count == rank:
                    say(f"{launch.name}, {config}", None)
                    try:
                        launch.run(config)
                    except Exception as error:  # who times it says so again
                        say(f"{launch.name}, {config}: {type(error).__name__}", False)
                    else:
                        say(f"{launch.name}, {config}", True)


def _in_a_process(share: Callable[..., None], rank: int, count: int, dtype: torch.dtype, queue: Any) -> None:
    share(rank, count, dtype, lambda text, held: queue.put((rank, text, held)))
    queue.put((rank, "", None))


def check(
    share: Callable[..., None], dtype: torch.dtype, deadline: float, workers: int, method: str = "spawn"
) -> tuple[int, int]:
    """How many configurations held, how many did not, of shares in as many processes: compiling is most of the time.

    What a process was at when it died or time ran out is printed, and counts as one that did not hold.
    """
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    processes = [
        context.Process(target=_in_a_process, args=(share, rank, workers, dtype, queue)) for rank in range(workers)
    ]
    for process in processes:
        process.start()
    held, broken, at = 0, 0, dict.fromkeys(range(workers), "its start")
    while at and time.monotonic() < deadline:
        try:
            rank, text, ok = queue.get(timeout=1)
        except Empty:
            for rank in [rank for rank in at if not processes[rank].is_alive()]:
                broken += 1
                print(f"  process {rank} died at {at.pop(rank)}", flush=True)
            continue
        if not text:
            del at[rank]
        elif ok is None:
            at[rank] = text
        else:
            held, broken = held + ok, broken + (not ok)
            if not ok:
                print(f"  {text}", flush=True)
    for text in at.values():
        broken += 1
        print(f"  out of time at {text}; what would follow is not checked", flush=True)
    for process in processes:
        process.kill()
    return held, broken


def on_paper(dtype: torch.dtype, *shape: int, fan_in: int = 1) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run_one_layer() -> None:
    """Each kind of tile once, on small maps: for compute-sanitizer and ncu."""
    for c, o, n, h, w in ((64, 64, 1, 34, 48), (128, 136, 2, 34, 48), (128, 128, 5, 7, 8)):
        x = torch.randn(n, c, h, w, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(o, c, 3, 3, device="cuda", dtype=torch.bfloat16) / (3 * c**0.5)
        for config in kernels.hopper.hopper_configs((c,), o, n, h, w, x.dtype, ksize=3, pool=True):
            kernels.hopper.conv_pool_fwd(x, weight, None, slope=0.0, config=config)
            torch.cuda.synchronize()
            print(config)
    x, weight, head = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in _WITH_HEAD)
    for config in kernels.hopper.hopper_configs((64,), 64, 1, 34, 48, x.dtype, ksize=3, pool=False, head=True):
        kernels.hopper.conv_head_fwd(x, weight / 24, None, head / 8, None, slope=0.0, config=config)
        torch.cuda.synchronize()
        print(config, "with a head")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default bf16, then fp16")
    parser.add_argument("--size", action="append", metavar="NxHxW", help="of the inputs; default the three of the aim")
    parser.add_argument("--budget", type=float, default=450.0, metavar="SECONDS", help="of all; default 450")
    parser.add_argument(
        "--workers",
        type=int,
        default=WORKERS,
        metavar="N",
        help=f"that check and compile; default {WORKERS} processes",
    )
    parser.add_argument("--skip-parity", action="store_true", help="time at once")
    parser.add_argument("--one-layer", action="store_true", help="only launch each kind of tile, for other tools")
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    obstacle = dispatch.why_not_hopper(device)
    if obstacle is not None:
        parser.error(f"needs a Hopper GPU: {obstacle}")
    if arguments.one_layer:
        run_one_layer()
        return 0
    sizes: Any = [tuple(map(int, size.split("x"))) for size in arguments.size or ()] or kernels.hopper.TUNED_SIZES
    dtypes = arguments.dtype or ["bf16", "fp16"]
    torch.backends.cudnn.benchmark = True  # cuDNN at its best
    torch.backends.cudnn.allow_tf32 = True
    start = time.monotonic()
    path = measured.SHIPPED / measured.shipped_name(torch.cuda.get_device_name(device))
    print(*(f"{name} {value}" for name, value in measured.versions(device).items()), sep=", ")
    wrong = 0
    for i, dtype in enumerate([] if arguments.skip_parity else dtypes):
        deadline = start + arguments.budget / 2 * (i + 1) / len(dtypes)
        held, broken = check(check_share, DTYPES[dtype], deadline, arguments.workers)
        wrong += broken
        print(f"parity, {dtype}: {held} of {held + broken} launch configurations hold", flush=True)
    for dtype in dtypes:
        share = functools.partial(compile_share, sizes, "cuda")
        compiled, broken = check(share, DTYPES[dtype], start + arguments.budget, arguments.workers)
        print(f"{dtype}: {compiled} candidates compiled, {broken} not; {time.monotonic() - start:.0f} s", flush=True)
        for n, h, w in sizes:
            make = functools.partial(on_paper, DTYPES[dtype])
            flops = {key_of(launch): launch.layer.flops for launch in launches(UNetConfig(), (n, h, w), make)}
            # On standard error what is tried: who hangs says nothing afterwards.
            trying = lambda text: print(f"  {text}", file=sys.stderr, flush=True)
            deadline = start + arguments.budget
            for key, entry in measure(UNetConfig(), (n, h, w), DTYPES[dtype], device, deadline=deadline, on_try=trying):
                save(path, device, {key: entry})
                rate = flops[key] / entry.microseconds[entry.implementation] / 1e6
                times = ", ".join(f"{name} {taken:.1f}" for name, taken in entry.microseconds.items())
                print(f"{key}: {entry.implementation} ({times} us), {rate:.0f} TFLOP/s, {entry.config}", flush=True)
    print(f"{path}; {time.monotonic() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
