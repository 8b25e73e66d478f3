"""``explain``: one row per layer, the choice of ``dispatch``, and clear refusals."""

from __future__ import annotations

import json

import pytest
import torch

from fastunet import dispatch
from fastunet.config import UNetConfig
from fastunet.explain import explain, explain_config
from fastunet.model import FastUNet
from fastunet.reference import UNet
from fastunet.trace import trace

SIZE = (2, 1, 20, 33)


@pytest.fixture
def model() -> FastUNet:
    return FastUNet(1, 2, (4, 8, 16))


def test_rows_are_the_trace_and_the_choice(model: FastUNet) -> None:
    explanation = explain(model, SIZE)
    assert [row.layer for row in explanation.rows] == trace(model.config, 20, 33, 2)
    choice = dispatch.choose(torch.device("cpu"), torch.float32)
    assert {row.choice for row in explanation.rows} == {choice}
    assert explanation.parameters == sum(p.numel() for p in model.parameters())


def test_device_and_dtype_default_to_the_models(model: FastUNet) -> None:
    explanation = explain(model.to(torch.bfloat16), SIZE)
    assert (explanation.device, explanation.dtype) == (torch.device("cpu"), torch.bfloat16)
    explanation = explain(model, SIZE, device="meta", dtype=torch.float64)
    assert (explanation.device, explanation.dtype) == (torch.device("meta"), torch.float64)
    assert "float64" in explanation.rows[0].choice.reason


def test_a_forced_choice_shows(model: FastUNet) -> None:
    with dispatch.forced("torch"):
        assert explain(model, SIZE).rows[0].choice == dispatch.Choice("torch", "asked for")


def test_to_dict_is_json_and_complete(model: FastUNet) -> None:
    explanation = explain(model, SIZE)
    entries = json.loads(json.dumps(explanation.to_dict()))
    assert entries["input_size"] == list(SIZE)
    assert (entries["device"], entries["dtype"]) == ("cpu", "float32")
    assert entries["flops"] == sum(layer["flops"] for layer in entries["layers"])
    assert len(entries["layers"]) == len(explanation.rows)
    assert {"name", "op", "in_shapes", "out_shape", "implementation", "reason"} <= entries["layers"][0].keys()


def test_the_table_is_aligned_and_names_every_layer(model: FastUNet) -> None:
    explanation = explain(model, SIZE)
    head, *body, last = str(explanation).splitlines()
    assert [line.split()[0] for line in body] == [row.layer.name for row in explanation.rows]
    place = head.index("because")
    for line, row in zip(body, explanation.rows, strict=True):
        assert line[place:] == row.choice.reason
    assert last == explanation.headline()
    assert "2x1x20x33" in last


@pytest.mark.parametrize(
    "size",
    [
        256,
        "2x1x8",
        (1, 20, 33),
        (2, 3, 20, 33),
        (2, 1, 3, 33),
        (0, 1, 20, 33),
        (2, 1, 20.0, 33),
        (2, 1, -20, 33),
    ],
    ids=str,
)
def test_bad_input_size_is_named(model: FastUNet, size: object) -> None:
    with pytest.raises(ValueError, match=r"input_size: expected four positive integers \(N, 1, H, W\)") as error:
        explain(model, size)  # type: ignore[arg-type]
    assert "at least 4 (2 poolings)" in str(error.value)


def test_a_plain_unet_is_refused() -> None:
    with pytest.raises(ValueError, match="model: expected a FastUNet, got UNet"):
        explain(UNet(1, 2, (4, 8)), SIZE)  # type: ignore[arg-type]


def test_a_description_allocates_nothing() -> None:
    huge = UNetConfig(features=(2**16, 2**18))  # terabytes, were it built
    explanation = explain_config(huge, (1, 1, 64, 64), torch.device("cpu"), torch.float32)
    assert explanation.parameters > 10**11
