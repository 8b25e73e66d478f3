"""What holds of every command: help, wrong usage, a process of its own."""

from __future__ import annotations

import shlex

import pytest
import torch

from .helpers import process

FUNCTIONS = {
    "segment": "fastunet.cli.segment.segment",
    "train": "fastunet.cli.train.train",
    "summary": "fastunet.cli.describe.summary",
    "info": "fastunet.cli.describe.info",
    "verify": "fastunet.cli.verify.run",
    "convert": "fastunet.cli.convert.run",
    "bench": "fastunet.cli.bench.bench",
    "report": "fastunet.cli.bench.report",
}
COMMANDS = tuple(FUNCTIONS)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("segment a.png", "the following arguments are required: --out"),
        ("segment --out b", "the following arguments are required: IMAGE_OR_FOLDER"),
        ("segment a.png --out b --device tpu", "argument --device: expected cpu, cuda or cuda:N, got 'tpu'"),
        ("segment a.png --out b --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("summary --size 12by9", "argument --size: expected a side or HEIGHTxWIDTH in pixels, got '12by9'"),
        ("summary --batch 0", "argument --batch: expected a positive integer, got '0'"),
        ("summary --upsample cubic", "argument --upsample: invalid choice: 'cubic'"),
        ("summary --upsample nearest --weights a.pt", "not allowed with argument"),
        ("segment a.png --out b --threshold 3", "unrecognized arguments: --threshold 3 (see fastunet segment --help)"),
        ("train a --out b --config nowhere.json", "got 'nowhere.json' (No such file or directory)"),
        ('train a --out b --config {"feature":[8]}', "got 'feature'"),
        ("paint", "invalid choice: 'paint'"),
        ("", "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_usage_is_one_line(run, arguments: str, named: str) -> None:
    done = run(*arguments.split())
    assert (done.code, done.out, len(done.errors)) == (2, "", 1)
    assert named in done.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available here")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"], ids=["current", "first"])
def test_cuda_asked_for_but_not_available(run, device: str) -> None:
    done = run("summary", "--device", device)
    assert (done.code, len(done.errors)) == (2, 1)
    assert f"argument --device: expected cpu, as CUDA is not available here, got '{device}'" in done.err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_examples_that_parse(run, command: str, monkeypatch) -> None:
    shown = run(*command.split(), "--help")
    assert (shown.code, shown.err) == (0, "")
    examples = shown.out.partition("Examples:\n")[2].splitlines()
    assert examples
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in COMMANDS:
        monkeypatch.setattr(FUNCTIONS[name], lambda arguments: 0)
    for example in examples:
        assert run(*shlex.split(example)[1:]).code == 0, example


def test_python_m_fastunet() -> None:
    child = process("-m", "fastunet", "summary", "--size", "8")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (2, "")
    assert err == "fastunet: --size: expected at least 16x16 for this network, got 8x8\n"
