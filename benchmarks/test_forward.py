"""Inference of the seed network, FastUNet beside plain PyTorch, in one run.

    make bench            # or: python -m pytest benchmarks

A provider's output is held to the parity rule before it is timed.
"""

from __future__ import annotations

import copy

import pytest
import torch

from fastunet import FastUNet
from fastunet.parity import compare
from fastunet.reference import UNet

SIZE, BATCH = 256, 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROVIDERS = ("eager", "eager channels_last", "fastunet")


@pytest.fixture(scope="module")
def nets():
    """The reference with the seed's widths (64 to 1024), an image, and the float64 truth."""
    torch.manual_seed(torch.seed() % 2**31)
    net = UNet().eval().to(DEVICE)
    x = torch.randn(BATCH, 1, SIZE, SIZE, device=DEVICE)
    with torch.inference_mode():
        return net, x, copy.deepcopy(net).double()(x.double()), net(x)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.benchmark(group=f"seed U-Net, {SIZE}x{SIZE}, batch {BATCH}, float32, {DEVICE}", min_rounds=5)
def test_forward(provider, nets, benchmark):
    net, x, truth, baseline = nets
    if provider == "fastunet":
        fast = FastUNet().eval().to(DEVICE)
        fast.load_state_dict(net.state_dict())
        net = fast
    elif provider == "eager channels_last":
        net = copy.deepcopy(net).to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        y = net(x)
        if y.is_cuda:
            torch.cuda.synchronize()
        return y

    parity = compare(forward(), baseline, truth, tf32=x.is_cuda)
    assert parity.ok, str(parity)
    benchmark.extra_info.update(threads=torch.get_num_threads(), torch=torch.__version__)
    benchmark(forward)
