"""What is refused, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastunet
from fastunet.convert import FAMILIES, export

from .cases import State, make, refusal


def drop(key: str) -> Callable[[State], None]:
    return lambda state: state.pop(key)


def put(key: str, *shape: int) -> Callable[[State], None]:
    return lambda state: state.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("milesial", drop("down2.maxpool_conv.1.double_conv.3.weight"),
         "nearest: milesial Pytorch-UNet, but key 'down2.maxpool_conv.1.double_conv.3.weight' is missing"),
        ("milesial", put("outc.conv.bias", 5), "but key 'outc.conv.bias' has shape (5,), expected (2,)"),
        ("milesial", put("aux.weight", 5), "but key 'aux.weight' is no part of it"),
        ("milesial", drop("inc.double_conv.0.weight"),
         "nearest: milesial Pytorch-UNet, but a key like 'inc.double_conv.0.weight' is missing"),
        ("monai", put("conv_0.conv_0.conv.weight", 4, 1, 3, 3, 3),
         "key 'conv_0.conv_0.conv.weight' has shape (4, 1, 3, 3, 3), expected 4 dimensions"),
        ("leejunhyun", put("Att5.W_g.0.weight", 4, 4, 1, 1), "but key 'Att5.W_g.0.weight' is no part of it"),
        ("nnunet", put("encoder.stages.0.0.convs.0.all_modules.0.bias", 4),
         "key 'encoder.stages.0.0.convs.0.all_modules.0.bias' holds other values than "
         "'encoder.stages.0.0.convs.0.conv.bias'"),
        ("nnunet", drop("decoder.encoder.stages.0.0.convs.0.conv.bias"),
         "key 'decoder.encoder.stages.0.0.convs.0.conv.bias' is missing"),
        ("seed two levels", put("dec1.conv.net.0.weight", 5, 12, 3, 3),
         "key 'dec1.conv.net.0.weight' has shape (5, 12, 3, 3), expected 11 input channels"),
        ("seed two levels", drop("classify.weight"), "expected one 1x1 convolution, the head, found 0"),
        ("jvanvugt valid transpose", drop("last.bias"), "key 'last.bias' is missing"),
        ("mateuszbuda", put("upconv4.weight", 64, 32, 3, 3),
         "key 'upconv4.weight' has shape (64, 32, 3, 3), expected (64, 32, 2, 2)"),
    ],
    ids=lambda value: "" if callable(value) else str(value)[:30],
)  # fmt: skip
def test_the_first_misfit_is_named(name, change, named):
    state = make(name).state_dict()
    change(state)
    message = refusal(state)
    assert named in message
    assert all(f"{family} (" in message for family in FAMILIES)


@pytest.mark.parametrize(
    ("x", "named"),
    [
        (nn.Linear(2, 2), "nearest: none, the first key is 'weight'"),
        ({"encoder.stages.9.weight": torch.zeros(1)}, "nearest: nnU-Net PlainConvUNet, but a key like"),
        ({}, "x: expected a state_dict of tensors, got an empty one"),
        ({"a": 1}, "x: expected a state_dict of tensors, 'a' is int"),
        (
            {"epoch": 3, "net": {"w": torch.zeros(1)}},
            "as the entry 'network_weights' or 'state_dict' or 'model_state_dict' or 'model', 'net' is dict",
        ),
        ({"ema": {"net": {"w": torch.zeros(1)}}}, "or as the entry 'network_weights' or "),
        ({1: torch.zeros(1)}, "found the key 1"),
        (7, "x: expected an nn.Module, a state_dict or a path, got int"),
    ],
    ids=["module", "near", "empty", "number", "entry", "entries", "key", "type"],
)
def test_what_is_no_unet(x, named):
    assert named in refusal(x)


def test_families_that_do_not_have_what_the_model_does():
    with pytest.raises(
        ValueError, match="expected concat='skip_first' of milesial Pytorch-UNet, got 'upsampled_first'"
    ):
        export(fastunet.FastUNet(1, 2, (4, 8), norm="batch", upsample="transpose"), "milesial")
    with pytest.raises(ValueError, match="model: expected align_corners=True of milesial"):
        export(fastunet.FastUNet(1, 2, (4, 8), norm="batch", concat="skip_first", align_corners=False), "milesial")
    fixed: dict[str, Any] = {"activation": "leaky_relu", "norm_eps": 1e-3, "norm_momentum": 0.5}
    for name, value in fixed.items():
        with pytest.raises(ValueError, match=f"model: expected {name}=.* of milesial Pytorch-UNet, got "):
            export(fastunet.FastUNet(1, 2, (4, 8), norm="batch", concat="skip_first", **{name: value}), "milesial")
    with pytest.raises(
        ValueError, match="written as milesial Pytorch-UNet: it has no place for layer 'downs.0.conv.net"
    ):
        export(fastunet.FastUNet(1, 2, (4, 8), norm="batch", encoder_convs=(3, 2)), "milesial")
    with pytest.raises(ValueError, match="model: expected activation='relu' of the tutorial's"):
        export(fastunet.FastUNet(1, 2, (4, 8), activation="leaky_relu"), "seed")
    with pytest.raises(ValueError, match="model: cannot be written as nnU-Net PlainConvUNet: "):
        export(fastunet.FastUNet(1, 2, (4, 8), upsample="bilinear"), "nnunet")
    with pytest.raises(ValueError, match="family: expected one of 'milesial', .*got 'unet'"):
        export(fastunet.FastUNet(1, 2, (4, 8)), "unet")
    with pytest.raises(ValueError, match="model: expected a FastUNet, got Linear"):
        export(nn.Linear(2, 2), "milesial")  # type: ignore[arg-type]


def test_options_of_a_changed_code_come_back(seed):
    """What milesial's own code cannot have, and the network that was converted did."""
    original = make("milesial")
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    back = export(fastunet.convert(original), "milesial")
    assert all(torch.equal(back[key], value) for key, value in original.state_dict().items())


def test_both_ways_to_the_functions():
    import fastunet.convert as module

    assert module is fastunet.convert
    assert fastunet.convert.export is export
