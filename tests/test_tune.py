"""What tune measures, keeps and leaves out. The timer is a stand-in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastunet import FastUNet, dispatch
from fastunet.config import UNetConfig
from fastunet.measured import Entry
from fastunet.parity.launches import Launch
from fastunet.tune import measure, tune

from .h200 import BF16


def test_the_fastest_right_one_is_kept(monkeypatch, seed):
    """A faster one that computes something else, or cannot run, is left out."""
    config, device = UNetConfig(8, 8, features=(8, 16), upsample="transpose"), torch.device("cpu")
    calls = []

    def timer(call):
        calls.append(call)
        return 10.0 if len(calls) % 2 else 5.0  # torch, which comes second, is faster

    def wrong(self, config=None):
        result = self.function(*self.tensors)
        return tuple(2 * t for t in result) if isinstance(result, tuple) else 2 * result

    monkeypatch.setattr("fastunet.parity.launches.Launch.run", wrong)
    with pytest.warns(UserWarning, match="left out: NO parity") as warned:
        entries = dict(measure(config, (1, 8, 8), torch.float32, device, timer))
    assert {entry.implementation for entry in entries.values()} == {"torch"}
    assert len(calls) == len(entries) == len(warned)

    calls.clear()
    monkeypatch.setattr("fastunet.parity.launches.Launch.run", lambda self, config=None: self.function(*self.tensors))
    entries = dict(measure(config, (1, 8, 8), torch.float32, device, timer))
    assert all(entry.microseconds == {"triton": 10.0, "torch": 5.0} for entry in entries.values())


def test_a_wrong_pooled_map_is_left_out_too(monkeypatch, seed):
    def wrong(self, config=None):
        result = self.function(*self.tensors)
        return (result[0], -result[1]) if isinstance(result, tuple) else result

    monkeypatch.setattr(Launch, "run", wrong)
    config, tried = UNetConfig(8, 8, features=(8, 16)), list[str]()
    with pytest.warns(UserWarning, match="left out: NO parity"):
        found = dict(measure(config, (1, 8, 8), torch.float32, torch.device("cpu"), lambda _: 1, on_try=tried.append))
    assert {"triton" in entry.microseconds for key, entry in found.items() if "pool" in key} == {False}
    assert all("triton" in entry.microseconds for key, entry in found.items() if "pool" not in key)
    assert tried[:2] == ["downs.0.conv.net.0, triton, None", "downs.0.conv.net.0, torch, None"]


def test_upsampling_behind_the_products_is_timed_too(monkeypatch, seed):
    monkeypatch.setattr(Launch, "run", lambda self, config=None: self.function(*self.tensors))
    found = dict(
        measure(UNetConfig(8, 8, features=(8, 16)), (1, 8, 8), torch.float32, torch.device("cpu"), lambda _: 1)
    )
    upsamples = {key: "bilinear" in key for key in found}
    assert any(upsamples.values())
    assert {key: "commuted" in entry.microseconds for key, entry in found.items()} == upsamples


@pytest.mark.parametrize("dtype, training", [(BF16, False), (BF16, True), (torch.float32, False)], ids=str)
def test_layers_are_timed_with_their_norms_factors(dtype, training, monkeypatch, seed):
    """In eval mode and 16 bits; else the norm is in the weights, or a pass of its own."""
    monkeypatch.setattr(Launch, "run", lambda self, config=None: self.function(*self.tensors))
    config, device = UNetConfig(8, 8, features=(8, 16), norm="batch", upsample="transpose"), torch.device("cpu")
    found = dict(measure(config, (1, 8, 8), dtype, device, lambda _: 1, training=training))
    of_norms = {key: "x3x3" in key for key in found}
    assert any(of_norms.values()) and not all(of_norms.values())
    wanted = of_norms if dtype == BF16 and not training else dict.fromkeys(found, False)
    assert {key: key.endswith(" with factors") for key in found} == wanted


def test_a_backward_pass_is_timed_step_by_step(monkeypatch, seed):
    """Of a layer of two sources both launches count, and a gradient that is another each time does not."""
    config, device = UNetConfig(8, 8, features=(8, 16), upsample="transpose"), torch.device("cpu")
    times = iter([10.0, 5.0] * 100)
    monkeypatch.setattr(Launch, "run", lambda self, config=None: self.function(*self.tensors))
    found = dict(measure(config, (1, 8, 8), torch.float32, device, lambda call: next(times), training=True))
    two_sources = "upsample_concat_conv2d_relu 1x8x8x8 + 1x8x8x8 by 8x16x3x3 float32"
    assert found[f"dgrad of {two_sources}"] == Entry("torch", {"triton": 20.0, "torch": 10.0})
    assert found[f"wgrad of {two_sources}"] == Entry("torch", {"triton": 10.0, "torch": 5.0})
    assert {key.partition(" of ")[0] for key in found if " of " in key} == {"dgrad", "wgrad"}
    assert len(found) % 3 == 0

    monkeypatch.setattr(dispatch, "why_not_hopper", lambda device: None)
    asked: list[Any] = []
    monkeypatch.setattr(
        Launch, "run", lambda self, config=None: (asked.append((self, config)), self.function(*self.tensors))[1]
    )
    found = dict(measure(config, (1, 8, 8), torch.float32, device, lambda call: 1.0, training=True))
    by_hopper = {key for key, entry in found.items() if "hopper" in entry.microseconds}
    assert f"dgrad of {two_sources}" in by_hopper and f"wgrad of {two_sources}" not in by_hopper
    of_gradients = {(launch.name, config) for launch, config in asked if launch.gradient and config is not None}
    assert len(of_gradients) == len({name for name, _ in of_gradients}) > 2  # of each the one that it would choose
    assert all(entry.config is None for key, entry in found.items() if " of " in key)

    def restless(self, config=None):
        result = self.function(*self.tensors)
        return result * (1 + 1e-7 * torch.rand_like(result)) if self.step == "wgrad" else result

    monkeypatch.setattr(Launch, "run", restless)
    with pytest.warns(UserWarning, match="left out: another result the second time"):
        found = dict(measure(config, (1, 8, 8), torch.float32, device, lambda call: 1.0, training=True))
    assert found[f"wgrad of {two_sources}"] == Entry("torch", {"torch": 1.0})


def test_a_deadline_ends_it(seed):
    assert not dict(measure(UNetConfig(8, 8, features=(8, 16)), (1, 8, 8), torch.float32,
                                 torch.device("cpu"), lambda call: 1.0, deadline=0.0))  # fmt: skip


def test_there_is_nothing_to_tune_on_a_cpu():
    with pytest.raises(RuntimeError, match="model: there is nothing to tune"):
        tune(FastUNet(1, 2, (4, 8)), (1, 1, 8, 8))
    with pytest.raises(ValueError, match="model: expected a FastUNet, got int"):
        tune(3, (1, 1, 8, 8))  # pyright: ignore[reportArgumentType]
