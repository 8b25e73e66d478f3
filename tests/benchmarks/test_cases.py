"""The cases of the suite, their work by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import bench, rows
from benchmarks.cases import NETWORKS, Case, cases, operators, quick
from benchmarks.work import Operator
from fastunet.config import UNetConfig


def test_the_cases_of_the_suite():
    names = [case.name for case in cases("cuda")]
    assert len(set(names)) == len(names)
    for size, batch in ((256, 1), (256, 16), (512, 1), (512, 8), (1024, 1)):
        for dtype in ("fp16", "bf16", "tf32"):
            assert f"infer seed {size}x{size} b{batch} {dtype}" in names
    for network in ("milesial-bilinear", "milesial-transpose"):
        assert f"infer {network} 256x256 b16 bf16" in names
    assert "infer pytorch_unet 640x959 b1 fp16 autocast" in names
    assert "train seed 256x256 b16 bf16" in names and "train seed 512x512 b4 bf16" in names
    for operator in ("downs.0.conv.net.0", "head", "ups.3.concat", "ups.3.conv.net.0"):
        assert f"op seed {operator} 512x512 b16 fp32" in names
    assert "op seed-transpose ups.0.up 256x256 b1 fp16" in names


def test_every_case_that_no_gpu_has_measured_is_pending():
    folder = Path(bench.__file__).parent
    listed = (folder / "PENDING.md").read_text(encoding="utf-8").partition("## Cases not yet measured")[2]
    commands = re.findall(r"--cases '([^']+)'", listed)
    measured = {row.case for row in rows.read(folder / "results")}
    for case in cases("cuda"):
        assert case.name in measured or any(text in case.name for text in commands), case.name


def test_flops_and_bytes_by_hand():
    case = Case("op", "seed", "bf16", 2, 256, 256, "downs.0.conv.net.2")
    assert case.flops == 2 * 9 * 64 * 64 * 2 * 256 * 256
    maps = 2 * 64 * 256 * 256 * (1 + 1 + 1 / 4)
    assert case.bytes == 2 * (maps + 9 * 64 * 64 + 64)
    assert Case("train", "seed", "bf16", 2, 256, 256).flops == 3 * Case("infer", "seed", "bf16", 2, 256, 256).flops
    # The tutorial's network at 256x256, from the table of floors: 111 GFLOP.
    assert Case("infer", "seed", "bf16", 1, 256, 256).flops / 1e9 == pytest.approx(111, abs=1)


def test_every_operator_counts_its_bytes():
    concat = Case("op", "seed", "bf16", 2, 256, 256, "ups.3.concat")
    x, skip = 2 * 128 * 128 * 128, 2 * 64 * 256 * 256
    assert (concat.flops, concat.bytes) == (0, 2 * (x + skip + 4 * x + skip))
    assert all(case.bytes > 0 for case in cases("cuda"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_quick_is_a_few_of_all(device):
    chosen, everything = quick(device), cases(device)
    assert all(case in everything for case in chosen) and len(set(chosen)) == len(chosen) <= 12
    assert {case.kind for case in chosen} == ({"op", "infer", "train"} if device == "cuda" else {"infer"})


def test_the_cpu_has_each_operator_and_layout_in_small():
    def kinds(device: str) -> set[str]:
        return {layer.op for case in cases(device) if case.kind == "op" for layer in case.layers}

    assert kinds("cpu") == kinds("cuda") >= {"conv_transpose2x2"}
    layouts = {(case.config.upsample, case.config.norm) for case in cases("cpu") if case.kind == "infer"}
    assert layouts >= {("bilinear", None), ("bilinear", "batch"), ("transpose", "batch")}


def test_layers_of_one_shape_are_one_operator():
    found = operators(NETWORKS["seed"], 256, 256, 1)
    shapes = [(layer.op, layer.in_shapes, layer.out_shape) for layer in found.values()]
    assert len(set(shapes)) == len(shapes)


@pytest.mark.parametrize(
    "options",
    [
        {"downsample": "stride", "upsample": "transpose", "strides": ((2, 1), (1, 2))},
        {"padding": "valid", "match": "center_crop"},
    ],
    ids=["strided", "unpadded"],
)
def test_an_operator_is_its_layer(options, monkeypatch, seed) -> None:
    """Of any stride and padding, plain and fused."""
    monkeypatch.setitem(NETWORKS, "other", UNetConfig(1, 2, (3, 4, 5), **options))
    layers = operators(NETWORKS["other"], 44, 44, 1)
    for name in layers:
        case = Case("op", "other", "fp32", 1, 44, 44, operator=name)
        inputs = [torch.randn(shape) for shape in case.layers[0].in_shapes]
        for fast in (False, True):
            found = Operator(case, fast)(*inputs)
            assert (found[0] if isinstance(found, tuple) else found).shape == layers[name].out_shape, (name, fast)
    assert any(layer.geometry for layer in layers.values())
