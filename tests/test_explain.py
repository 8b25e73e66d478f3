"""``explain``: one row per layer, the choice of ``dispatch``, and clear refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

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
    reason = dispatch.choose(torch.device("cpu"), torch.float32).reason
    assert {row.choice for row in explanation.rows} == {dispatch.Choice("reference", reason)}
    assert explanation.parameters == sum(p.numel() for p in model.parameters())


def test_device_and_dtype_default_to_the_models(model: FastUNet) -> None:
    explanation = explain(model.to(torch.bfloat16), SIZE)
    assert (explanation.device, explanation.dtype) == (torch.device("cpu"), torch.bfloat16)
    explanation = explain(model, SIZE, device="meta", dtype=torch.float64)
    assert (explanation.device, explanation.dtype) == (torch.device("meta"), torch.float64)
    assert "float64" in explanation.rows[0].choice.reason


def test_a_forced_choice_shows(model: FastUNet) -> None:
    with dispatch.forced("torch"):
        assert explain(model, SIZE).rows[0].choice == dispatch.Choice("reference", "asked for")


def test_a_replaced_layer_joins_no_head(model: FastUNet, device: str) -> None:
    model.head = nn.Conv2d(4, 2, 1, padding_mode="reflect")
    with dispatch.forced("triton"):
        explanation = explain(model, SIZE, device=device)
        joined = explain_config(model.config, SIZE, torch.device(device), torch.float32)
    assert [row.layer for row in explanation.rows] == trace(model.config, 20, 33, 2)
    assert explanation.bytes > joined.bytes


def test_to_dict_is_json_and_complete(model: FastUNet) -> None:
    explanation = explain(model, SIZE)
    entries = json.loads(json.dumps(explanation.to_dict()))
    assert entries["input_size"] == list(SIZE)
    assert (entries["device"], entries["dtype"]) == ("cpu", "float32")
    assert entries["flops"] == sum(layer["flops"] for layer in entries["layers"])
    assert len(entries["layers"]) == len(explanation.rows)
    assert entries["bytes"] == sum(layer["bytes"] for layer in entries["layers"])
    asked = {"name", "op", "in_shapes", "out_shape", "dtype", "implementation", "reason", "flops", "bytes"}
    assert asked <= entries["layers"][0].keys()


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


def test_bytes_are_counted_by_hand() -> None:
    """One pixel-wise network: a stage of two convolutions and the head, at 4x4, in float16."""
    config = UNetConfig(1, 1, (2,), conv_bias=False)
    rows = explain_config(config, (1, 1, 4, 4), torch.device("cpu"), torch.float16).rows
    #                   inputs    weights         outputs
    elements = [16 + 9 * 1 * 2 + 32, 32 + 9 * 2 * 2 + 32, 32 + 2 + 1 + 16]
    assert [row.bytes for row in rows] == [2 * n for n in elements]


def test_a_pooled_map_and_a_norm_apart_are_counted() -> None:
    """Pooling writes a quarter more; a norm of its own reads and writes the map once more."""
    size = (1, 1, 8, 8)
    plain, batch, instance = (
        {
            row.layer.name.split(".net.")[0]: row.layer
            for row in explain_config(
                UNetConfig(1, 1, (4, 4), norm=norm, encoder_convs=(1, 1)), size, torch.device("cpu"), torch.float32
            ).rows
        }["downs.0.conv"]
        for norm in (None, "batch", "instance")
    )
    pooled = 4 * 4 * 4
    assert plain.elements == batch.elements == 64 + 9 * 4 + 4 + 4 * 64 + pooled
    assert instance.elements == plain.elements - pooled + 2 * 4 * 64


STRIDED = UNetConfig(1, 2, (4, 8), upsample="transpose", downsample="stride", strides=((2, 1),))


@pytest.mark.parametrize(
    ("config", "geometry", "layers"),
    [
        (STRIDED, "with a stride of 2x1", {"bottleneck.net.0"}),
        (
            UNetConfig(1, 2, (4, 8), padding="valid", match="center_crop", encoder_convs=(1, 1), decoder_convs=(1,)),
            "without padding",
            {"downs.0.conv.net.0", "bottleneck.net.0", "ups.0.conv.net.0"},
        ),
    ],
    ids=["stride", "valid"],
)
def test_layers_that_change_their_maps_size(config: UNetConfig, geometry: str, layers: set[str]) -> None:
    """Portable kernels serve them, other implementations say why they do not."""
    size, cpu = (1, 1, 16, 16), torch.device("cpu")
    with dispatch.forced("triton"):
        assert {row.choice.implementation for row in explain_config(config, size, cpu, torch.float32).rows} == {
            "triton"
        }
    with dispatch.forced("commuted"):
        rows = explain_config(config, size, cpu, torch.float32).rows
    found = {row.layer.name for row in rows if f"it serves no convolution {geometry}" in row.choice.reason}
    assert found == layers


@pytest.mark.parametrize(("norm", "order"), [("instance", "conv_norm_act"), ("batch", "conv_act_norm")])
def test_a_norm_of_its_own_is_said(norm: str, order: str) -> None:
    config = UNetConfig(1, 2, (4, 8), norm=norm, order=order)
    with dispatch.forced("triton"):
        rows = explain_config(config, (1, 1, 16, 16), torch.device("cpu"), torch.float32).rows
    assert rows[0].choice == dispatch.Choice("triton", f"asked for, then {norm} norm by a kernel")
    with dispatch.forced("triton"):
        strided = dataclasses.replace(STRIDED, norm=norm, order=order)
        rows = explain_config(strided, (1, 1, 16, 16), torch.device("cpu"), torch.float32).rows
    reasons = {row.layer.name: row.choice.reason for row in rows}
    assert reasons["bottleneck.net.0"] == f"asked for, then {norm} norm by a kernel"
    assert rows[-1].choice == dispatch.Choice("triton", "asked for")


@pytest.mark.parametrize(
    "config",
    [UNetConfig(1, 2, (4, 8), norm="instance"), UNetConfig(1, 2, (4, 8), padding="valid", match="center_crop")],
    ids=["instance", "valid"],
)
def test_where_a_cpu_runs_the_reference(config: UNetConfig) -> None:
    rows = explain_config(config, (1, 1, 24, 24), torch.device("cpu"), torch.float32).rows
    assert {row.choice.implementation for row in rows} == {"reference"}
    assert "the reference network runs as it is" in rows[0].choice.reason


def test_operators_that_were_asked_for_serve_a_norm_on_a_cpu() -> None:
    with dispatch.forced("torch"):
        rows = explain_config(
            UNetConfig(1, 2, (4, 8), norm="instance"), (1, 1, 24, 24), torch.device("cpu"), torch.float32
        ).rows
    assert {row.choice for row in rows} == {dispatch.Choice("reference", "asked for")}


def test_a_size_that_strides_do_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match="input_size: height: expected a multiple of 2, got 17"):
        explain_config(STRIDED, (1, 1, 17, 16), torch.device("cpu"), torch.float32)
