"""Original networks against what ``fastunet.convert`` makes of them, on a CPU: time and error, as a table.

    python -m benchmarks.convert

Widths are the originals' defaults, in eval mode without gradients, float32, one image. Rounds are
interleaved, original and converted taking turns in which goes first; the figures are medians of the
process's CPU time, which other processes disturb less than the clock's.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastunet

warnings.simplefilter("ignore")  # of MONAI's own imports
from dynamic_network_architectures.architectures.unet import PlainConvUNet  # noqa: E402
from monai.networks.nets.basic_unet import BasicUNet  # noqa: E402

from tests.convert.networks import Jvanvugt, LeeJunHyun, Listed, Mateuszbuda, Milesial  # noqa: E402

ROUNDS = 9
_STAGES = 6
_PLAIN_CONV_UNET: Any = partial(
    PlainConvUNet, 1, _STAGES, [min(32 * 2**i, 512) for i in range(_STAGES)], nn.Conv2d, 3,
    [1, *[2] * (_STAGES - 1)], 2, 2, 2, conv_bias=True, norm_op=nn.InstanceNorm2d,
    norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
)  # fmt: skip

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "seed, 64 to 1024": (partial(Listed, (64, 128, 256, 512, 1024)), 128),
    "milesial": (partial(Milesial, width=64), 128),
    "milesial, bilinear": (partial(Milesial, width=64, bilinear=True), 128),
    "milesial before 2021-12, bilinear": (partial(Milesial, width=64, bilinear=True, bias=True), 128),
    "mateuszbuda": (partial(Mateuszbuda, width=32), 256),
    "jvanvugt, valid, transpose": (partial(Jvanvugt, depth=5, width=64), 188),
    "jvanvugt, valid, batch norm": (partial(Jvanvugt, depth=5, width=64, batch_norm=True), 188),
    "jvanvugt, same, batch norm, bilinear": (
        partial(Jvanvugt, depth=5, width=64, padding=True, batch_norm=True, upconv=False), 128,
    ),
    "leejunhyun": (partial(LeeJunHyun, width=64), 128),
    "monai": (partial(BasicUNet, 2, 1, 2), 256),
    "monai, nontrainable": (partial(BasicUNet, 2, 1, 2, upsample="nontrainable"), 256),
    "nnunet": (_PLAIN_CONV_UNET, 256),
}  # fmt: skip


def seconds(network: nn.Module, x: Tensor) -> float:
    start = time.process_time()
    network(x)
    return time.process_time() - start


@torch.no_grad()
def measure(name: str) -> Iterator[str]:
    """The cells of a network's row."""
    make, side = NETWORKS[name]
    torch.manual_seed(0)
    original = make().eval()
    model = fastunet.convert(original)
    x = torch.randn(1, model.config.in_channels, side, side)
    times: dict[nn.Module, list[float]] = {original: [], model: []}
    for network in times:
        network(x)  # lays out weights, once
    for number in range(ROUNDS):
        for network in list(times)[:: 1 if number % 2 else -1]:
            times[network].append(seconds(network, x))
    theirs, ours = (statistics.median(found) for found in times.values())
    y, z = original(x), model(x)
    exact = original.double()(x.double())
    wide = model.double()(x.double())
    yield from (
        name,
        f"{x.shape[1]}x{side}x{side}",
        f"{1e3 * theirs:.0f}",
        f"{1e3 * ours:.0f}",
        f"{theirs / ours:.2f}x",
    )
    yield f"{(wide - exact).abs().max():.0e}"
    yield from (f"{(result - exact).abs().max():.1e}" for result in (z, y))


def main() -> None:
    torch.set_num_threads(1)
    heads = "network", "input", "original ms", "converted ms", "faster", "float64", "float32", "original's"
    print(f"PyTorch {torch.__version__}, 1 thread, medians of {ROUNDS} interleaved rounds")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in NETWORKS:
        if all(word in name for word in sys.argv[1:]):
            print(f"| {' | '.join(measure(name))} |", flush=True)


if __name__ == "__main__":
    main()
