"""What is taken: every family, however it is wrapped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastunet
from fastunet import weights
from fastunet.convert import FAMILIES, export

from .cases import CASES, State, image, make, refusal
from .networks import Assembled, DoubleConv, Down, Listed, Tutorial, Up


@pytest.mark.parametrize("name", CASES)
def test_the_family_is_named(name):
    model = fastunet.convert(make(name))
    assert model.origin is not None
    assert model.origin.family == CASES[name].family
    assert str(model.origin).startswith(FAMILIES[CASES[name].family].title)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("entry", [None, "network_weights", "state_dict", "model_state_dict", "model"])
def test_wrappers_are_taken_off(prefix, entry, seed):
    state = make("nnunet").state_dict()
    wrapped: State = {f"{prefix}{key}": value for key, value in state.items()}
    if entry is not None:
        wrapped = {"epoch": 3, entry: wrapped, "optimizer": {"lr": 0.1}}
    back = export(fastunet.convert(wrapped), "nnunet")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel], ids=["parallel", "compile", "swa"]
)
def test_wrapped_modules(wrap, seed):
    original = make("milesial")
    x = image(original, (32, 32))
    with torch.no_grad():
        torch.testing.assert_close(fastunet.convert(wrap(original))(x), original(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("entry", [None, "model"])
@pytest.mark.parametrize("wrap", [lambda x: x, nn.DataParallel], ids=["", "parallel"])
def test_files_of_averaged_weights(wrap, entry, seed, tmp_path):
    """AveragedModel keeps ``n_averaged`` beside ``module.``, whatever wraps it or is wrapped by it."""
    original = make("milesial")
    averaged = torch.optim.swa_utils.AveragedModel(wrap(original))
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.mul_(3)
    averaged.update_parameters(wrap(original))  # the first copies
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.mul_(2)
    averaged.update_parameters(wrap(original))
    state: State = dict(wrap(averaged).state_dict())
    assert any(key.endswith("n_averaged") for key in state)
    torch.save({"epoch": 3, entry: state} if entry else state, tmp_path / "swa.pth")
    back = export(fastunet.convert(tmp_path / "swa.pth"), "milesial")
    assert back.keys() == original.state_dict().keys()
    key = "outc.conv.weight"
    torch.testing.assert_close(back[key], original.state_dict()[key] * 0.75)


def test_entries_beside_the_weights_come_back(tmp_path):
    """milesial's released files say which mask value is which class."""
    state = {**make("milesial").state_dict(), "mask_values": [0, 1]}
    torch.save(state, tmp_path / "theirs.pth")
    model = fastunet.convert(tmp_path / "theirs.pth")
    assert export(model, "milesial")["mask_values"] == [0, 1]
    weights.save(model, tmp_path / "ours.safetensors")
    assert export(weights.load(tmp_path / "ours.safetensors"), "milesial")["mask_values"] == [0, 1]


def test_heads_of_deep_supervision_come_back(seed):
    state = make("nnunet").state_dict()
    back = export(fastunet.convert(state), "nnunet")
    assert torch.equal(back["decoder.seg_layers.0.weight"], state["decoder.seg_layers.0.weight"])


def test_numbers_of_numpy_in_a_checkpoint(tmp_path):
    """nnU-Net's training log holds some; they are no code."""
    log = {"dice": [np.float64(0.5), np.float32(0.25)], "epochs": np.int64(3)}
    torch.save({"network_weights": make("nnunet").state_dict(), "logging": log}, tmp_path / "checkpoint_final.pth")
    assert fastunet.convert(tmp_path / "checkpoint_final.pth").config.features == (4, 6, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_dtype_is_kept(dtype):
    model = fastunet.convert(make("milesial").to(dtype).state_dict())
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_fastunet_of_ours(seed):
    reference = fastunet.reference.UNet(1, 2, (4, 8), norm="batch", align_corners=False)
    model = fastunet.convert(reference)
    assert type(model) is fastunet.FastUNet and model.config == reference.config
    assert all(torch.equal(value, reference.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("shuffle", [sorted, lambda keys: sorted(keys, reverse=True)], ids=["sorted", "reversed"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.family == "seed"])
def test_the_tutorials_levels_are_told_by_channels_in_any_order_of_keys(name, shuffle, seed):
    original = make(name).double()
    state = original.state_dict()
    model = fastunet.convert({key: state[key] for key in shuffle(state)})
    x = image(original, CASES[name].size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.family == "seed"])
def test_the_tutorials_blocks_in_safetensors_which_sort_names(name, seed, tmp_path):
    original = make(name)
    save_file(original.state_dict(), tmp_path / "theirs.safetensors")
    model = fastunet.convert(tmp_path / "theirs.safetensors")
    assert model.origin == fastunet.convert(original.state_dict()).origin
    back = export(model, "seed")
    assert back.keys() == original.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in original.state_dict().items())


@pytest.mark.parametrize("bottleneck", ["mid_conv", "middle"])
def test_a_bottleneck_of_any_name(bottleneck, seed):
    original = Tutorial(bottleneck).double()
    x = torch.randn(1, 1, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fastunet.convert(original)(x), original(x))


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (lambda: Assembled(4, widths=(4, 4, 4, 4, 4)), "of 'enc1.conv' from that of 'enc2.conv'"),
        (lambda: Assembled(2, widths=(4, 4, 4, 4, 4)), "of 'dec1.conv' from that of 'dec2.conv'"),
        (lambda: Listed((4, 4, 4, 4)), "of 'contract.1.conv' from that of 'contract.2.conv'"),
    ],
    ids=["encoder", "decoder", "list"],
)
def test_the_tutorials_levels_that_channels_do_not_tell_apart_are_refused(network, named):
    """A guess by the order of keys would compute something else, and nobody would see."""
    assert named in refusal(network())


def test_equal_widths_can_be_written_as_the_tutorials(seed):
    """On the way out nothing has to be told by channels."""
    model = fastunet.FastUNet(1, 2, (4, 4, 4, 4))
    back = export(model, "seed")
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in back.items())


def test_more_levels_than_can_be_tried_are_refused():
    network = fastunet.reference.UNet(1, 2, tuple(range(2, 12)))
    assert "double convolutions, from 3 to 17, found 19" in refusal(network.state_dict())


def test_blocks_that_fit_in_two_orders_are_refused():
    """Though all of them differ: a, b, c or b, c, a lead down to the bottleneck, and both come back to the head."""
    blocks = {"a": Down(3, 3), "b": Down(3, 4), "c": Down(4, 3), "d": Up(5, 1), "e": Up(5, 4), "f": Up(7, 1)}
    network = nn.ModuleDict({**blocks, "middle": DoubleConv(3, 2), "head": nn.Conv2d(1, 2, 1)})
    message = refusal(network)
    assert "channels do not tell the place of 'a.conv' from that of 'b.conv'" in message
