"""Small runs, how to stop one, and what it leaves."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastunet import FastUNet, UNetConfig
from fastunet.reference import UNet
from fastunet.train import Settings

CONFIG = UNetConfig(features=(4, 8), norm="batch")
FILES = {"best.safetensors", "last.safetensors", "last.pt", "curve.csv", "curve.png", ".lock"}
QUICK = Settings(steps=6, batch=2, size=16, every=2, ema=0.5)


def new_model(config: UNetConfig = CONFIG, kind: type[UNet] = FastUNet) -> UNet:
    torch.manual_seed(7)
    return kind.from_config(config)


def files_of(out: Path) -> dict[str, Any]:
    """All that a run left, but for its speed."""
    state = torch.load(out / "last.pt", weights_only=True)
    for point in state["points"]:
        del point["images_per_second"]
    with (out / "curve.csv").open() as file:
        rows = [{**row, "images_per_second": ""} for row in csv.DictReader(file)]
    files = {name: (out / name).read_bytes() for name in ("best.safetensors", "last.safetensors")}
    return {"state": state, "rows": rows, **files}


def assert_same(a: Any, b: Any) -> None:
    """Equal to the bit, tensors inside dictionaries and lists too."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


class Stop(Exception):
    pass


def names_of(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


def stop_at(last: int) -> Callable[[int, Tensor], None]:
    def on_step(step: int, loss: Tensor) -> None:
        if step == last:
            raise Stop

    return on_step
