"""``fastunet summary`` and ``fastunet info``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastunet.config import UPSAMPLE, UNetConfig
from fastunet.reference import UNet
from fastunet.trace import totals, trace


@pytest.mark.parametrize(("size", "parsed"), [("256", (256, 256)), ("48x64", (48, 64)), ("50x33", (50, 33))])
@pytest.mark.parametrize("upsample", UPSAMPLE)
def test_summary_shows_every_layer_and_the_totals(run, size: str, parsed: tuple[int, int], upsample: str) -> None:
    done = run("summary", "--size", size, "--batch", "3", "--upsample", upsample)
    assert (done.code, done.err) == (0, "")
    layers = trace(UNetConfig(upsample=upsample), *parsed, batch=3)
    shown = [line.split() for line in done.out.splitlines()]
    for layer in layers:
        row = next(words for words in shown if words[:1] == [layer.name])
        assert layer.op in row
        assert "x".join(map(str, layer.out_shape)) in row
        assert f"{layer.parameters:,}" in row
    assert f"{totals(layers)[0]:,} parameters" in done.out
    assert "reference: the device is a CPU" in done.out or torch.cuda.is_available()
    assert "the bottleneck is 16x16" in done.out


def test_summary_of_a_configuration(run, tmp_path: Path) -> None:
    text = '{"padding": "valid", "match": "center_crop", "features": [4, 8]}'
    path = tmp_path / "config.json"
    path.write_text(text)
    shown = [run("summary", "--size", "40", "--config", config) for config in (text, path)]
    assert shown[0] == shown[1] and shown[0].code == 0
    for layer in trace(UNetConfig(padding="valid", match="center_crop", features=(4, 8)), 40, 40):
        assert re.search(rf"{re.escape(layer.name)} .* {'x'.join(map(str, layer.out_shape))} ", shown[0].out)
    assert "tutorial" not in shown[0].out
    both = run("summary", "--config", text, "--upsample", "nearest")
    assert both.code == 2 and "not allowed with argument --config" in both.err


def test_summary_builds_no_network(run, monkeypatch) -> None:
    def refuse(*_, **__) -> None:
        raise AssertionError("a module was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    assert run("summary").code == 0


def test_summary_of_a_file(run, file: Path, model: UNet) -> None:
    done = run("summary", "--weights", file, "--size", "64")
    assert done.code == 0
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in done.out
    assert "tutorial" not in done.out


def test_summary_of_too_small_a_size(run) -> None:
    done = run("summary", "--size", "15x300")
    assert (done.code, done.out) == (2, "")
    assert done.errors == ["fastunet: --size: expected at least 16x16 for this network, got 15x300"]


def test_info(run) -> None:
    done = run("info")
    assert (done.code, done.err) == (0, "")
    for name in ("fastunet", "torch", "triton", "python", "CUDA", "cuDNN", "capability", "SMs"):
        assert name in done.out
    assert torch.__version__ in done.out
    for dtype in ("fp32", "fp16", "bf16"):
        assert re.search(rf"cpu +{dtype} +(usable|not usable: )", done.out)
