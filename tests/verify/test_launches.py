"""``--all-configs``: every launch of both passes, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastunet import UNetConfig, kernels
from fastunet.parity.configs import check_configs

NETWORKS: list[dict[str, Any]] = [
    {"upsample": "bilinear", "align_corners": False},  # two sources, upsampled on the way; a pool
    {"upsample": "nearest", "activation": "leaky_relu"},
    {"upsample": "transpose", "norm": "batch"},  # folded, and not in training
    {"upsample": "bilinear_conv", "norm": "instance"},
    {"upsample": "transpose", "downsample": "stride", "strides": ((2, 1),)},
    {"upsample": "bilinear", "padding": "valid", "match": "center_crop"},
]


def check(device: str, **options: Any) -> dict[str, bool]:
    """Whether all configurations of each launch hold, by its name."""
    config = UNetConfig(2, 2, (3, 5), encoder_convs=(1, 1), decoder_convs=(1,), **options)
    found: dict[str, bool] = {}
    size = (2, 10, 11) if config.padding == "valid" else (2, 6, 5)
    for comparison in check_configs(config, size, device, torch.float16, seed=0):
        found[comparison.name] = found.get(comparison.name, True) and comparison.ok
    return found


@pytest.mark.parametrize("options", NETWORKS, ids=str)
def test_every_launch_of_both_passes_holds(options, device):
    found = check(device, **options)
    assert all(found.values()), found
    assert {"head", "head, gradient of the weight", "ups.0.conv.net.0, gradient of the skip"} < found.keys()
    assert ("downs.0.conv.net.0, in training" in found) == (options.get("norm") == "batch")
    assert ("ups.0.conv.net.0, gradient of the map before upsampling" in found) == (options["upsample"] != "transpose")


def test_float32_is_checked_in_tf32_and_in_full(device):
    config = UNetConfig(1, 1, (2,), encoder_convs=(1,))
    texts = [c.implementation for c in check_configs(config, (1, 2, 2), device, torch.float32, 0) if c.name == "head"]
    assert {text.rpartition(", ")[2] for text in texts} == {"tf32", "ieee"}


@pytest.mark.parametrize(
    "launcher, broken",
    [
        ("activation_bwd", "the sums before its activation"),
        ("conv_wgrad", "the weight"),
        ("conv_dgrad", "the skip"),
        ("upsample_bwd", "the map before upsampling"),
    ],
)
def test_a_faulty_gradient_kernel_is_named(launcher, broken, device, monkeypatch):
    right = getattr(kernels, launcher)

    def wrong(*tensors: Any, **options: Any) -> Any:
        found = right(*tensors, **options)
        return (1.1 * found[0], found[1]) if isinstance(found, tuple) else 1.1 * found

    monkeypatch.setattr(kernels, launcher, wrong)
    found = check(device, **NETWORKS[0])
    assert not found[f"ups.0.conv.net.0, gradient of {broken}"]
    assert all(found[name] for name in ("head", "ups.0.conv.net.0", "head, gradient of the bias"))
