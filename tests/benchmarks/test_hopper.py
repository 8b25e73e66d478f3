"""benchmarks/hopper.py with stand-ins for what needs the GPU."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import hopper as hopper_script
from fastunet import dispatch, measured
from fastunet.config import UNetConfig
from fastunet.measured import Entry
from fastunet.parity.launches import Launch, launches

from ..h200 import BF16, CONFIG_FIELDS, GPU


def a_share(rank, count, dtype, say):
    """As of benchmarks/hopper.py: the first process ends, the second dies, the third hangs."""
    say(f"{rank} a", None)
    say(f"{rank} a", rank != 2)
    say(f"{rank} b", None)
    if rank == 1:
        time.sleep(0.2)  # what it said is on its way
        os._exit(1)
    if rank == 2:
        time.sleep(60)


def test_of_processes_that_check_the_one_that_dies_or_hangs_is_told_by_what_it_was_at(capsys):
    found = hopper_script.check(a_share, BF16, time.monotonic() + 4, 3, method="fork")
    assert found == (2, 3)
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "  2 a",
        "  out of time at 2 b; what would follow is not checked",
        "  process 1 died at 1 b",
    ]


@pytest.mark.usefixtures("hopper")
def test_what_is_timed_is_compiled_before_by_several_processes(monkeypatch):
    """Every candidate by one of them; one that fails keeps nobody from the others."""
    ran = []

    def run(launch, config=None):
        ran.append(config)
        if config == "commuted":
            raise ValueError("too much shared memory")

    monkeypatch.setattr(Launch, "run", run)
    monkeypatch.setattr(dispatch, "why_not_hopper", lambda device: None)
    said: list[tuple[str, bool | None]] = []
    sizes, say = [(1, 16, 16), (1, 32, 48)], lambda *words: said.append(words)
    for rank in range(3):
        hopper_script.compile_share(sizes, "meta", rank, 3, BF16, say)
    wanted = [
        config
        for size in sizes
        for launch in launches(UNetConfig(), size, lambda *shape, fan_in=1: torch.empty(shape, dtype=BF16))
        for config in (None, *launch.hopper, *launch.commuted(True))
    ]
    assert sorted(map(str, ran)) == sorted(map(str, wanted)) and "hopper commuted" in wanted
    assert [held for _, held in said].count(None) == len(wanted)
    failed = [text for text, held in said if held is False]
    assert len(failed) == wanted.count("commuted") and all(text.endswith("ValueError") for text in failed)


@pytest.mark.usefixtures("hopper")
def test_the_script_for_a_hopper_gpu_checks_times_and_writes_the_table(monkeypatch, capsys):
    """benchmarks/hopper.py with a stand-in for what needs the GPU."""
    wrong, said, compiled = 0, list[tuple[str, bool | None]](), []
    comparison = SimpleNamespace(parity=SimpleNamespace(ok=True), name="head", implementation="a config")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)  # of a PyTorch built for CUDA looks for a GPU
    monkeypatch.setattr(hopper_script, "check_configs", lambda *a, **k: iter([comparison, comparison]))
    monkeypatch.setattr(hopper_script, "check", lambda share, dtype, *_: share(0, 1, dtype, record) or (2, wrong))
    monkeypatch.setattr(hopper_script, "compile_share", lambda sizes, device, *_: compiled.append((sizes, device)))

    def record(text: str, held: bool | None) -> None:
        said.append((text, held))

    key = "conv2d_relu 1x64x32x32 by 64x64x3x3 bfloat16"
    entry = Entry("hopper", {"hopper": 1.0, "torch": 2.0}, CONFIG_FIELDS)
    monkeypatch.setattr(hopper_script, "measure", lambda *a, **k: iter([(key, entry)]))
    monkeypatch.setattr("sys.argv", ["hopper.py", "--dtype", "bf16", "--size", "1x32x32"])
    assert hopper_script.main() == 0
    out = capsys.readouterr().out
    assert "2 of 2 launch configurations hold" in out
    assert "hopper (hopper 1.0, torch 2.0 us), 75 TFLOP/s" in out  # 2 x 9 x 64 x 64 x 1024 in a microsecond
    assert "bf16: 2 candidates compiled, 0 not" in out and compiled == [([(1, 32, 32)], "cuda")]
    assert measured.table(GPU) == {key: entry}
    assert [held for _, held in said] == [True, True] and said[0][0].startswith("head, a config: ")
    wrong = 1
    assert hopper_script.main() == 1
