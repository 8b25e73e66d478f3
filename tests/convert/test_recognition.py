"""What is taken, what is refused, and what is said about either."""

from __future__ import annotations

import io
import json
import logging
import pickle
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastunet
from fastunet import weights
from fastunet.checkpoint import WeightsError
from fastunet.convert import FAMILIES, export

from .cases import CASES, basic_unet, image, make, plain_conv_unet
from .networks import Assembled, DoubleConv, Down, Jvanvugt, Listed, Milesial, Tutorial, Up

State = dict[str, Any]


def refusal(x: Any, /, **told: Any) -> str:
    with pytest.raises(WeightsError) as error:
        fastunet.convert(x, **told)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- what is taken ---------------------------------------------------------------------------


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


# --- what keys do not tell -------------------------------------------------------------------


def test_modules_tell_what_keys_do_not(seed):
    network = Milesial(bilinear=True)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-3, 0.02
        if isinstance(module, nn.Upsample):
            module.align_corners = False
    config = fastunet.convert(network).config
    assert (config.norm_eps, config.norm_momentum, config.align_corners) == (1e-3, 0.02, False)
    config = fastunet.convert(basic_unet(act=("leakyrelu", {"negative_slope": 0.3}))).config
    assert (config.activation, config.negative_slope) == ("leaky_relu", 0.3)
    assert fastunet.convert(Jvanvugt(padding=True)).config.padding == "same"


def test_a_state_dict_says_what_was_assumed(caplog):
    with caplog.at_level(logging.WARNING, "fastunet.convert"):
        model = fastunet.convert(Jvanvugt(upconv=False, batch_norm=True).state_dict())
    assert model.origin is not None
    assert model.origin.assumed == {
        "activation": "relu", "align_corners": False, "norm_eps": 1e-5, "norm_momentum": 0.1, "padding": "valid",
    }  # fmt: skip
    assert "assumed, as keys and shapes do not tell: activation='relu', align_corners=False" in caplog.text
    assert "padding='valid'" in caplog.text


@pytest.mark.parametrize(
    ("make", "norm"),
    [
        (basic_unet, "instance"),
        (partial(basic_unet, norm=("group", {"num_groups": 1})), "instance"),
        (partial(basic_unet, norm=("batch", {"track_running_stats": False})), "instance"),
        (partial(basic_unet, norm="instance"), None),
        (partial(plain_conv_unet, norm_op=None), None),
    ],
    ids=["instance", "group", "batch without statistics", "no weights", "none"],
)
def test_a_norm_that_keys_do_not_tell_is_assumed(make, norm):
    """All of the first three have the same keys and shapes, and so have the other two."""
    model = fastunet.convert(make().state_dict())
    assert model.config.norm == norm and model.origin is not None and model.origin.assumed["norm"] == norm
    told = fastunet.convert(make().state_dict(), norm=norm)
    assert told.origin is not None and "norm" not in told.origin.assumed
    assert "nearest" in refusal(make().state_dict(), norm="batch")


@pytest.mark.parametrize("name", ["milesial", "jvanvugt same bilinear", "seed two levels", "monai batch norm"])
def test_a_norm_that_keys_tell_is_not_assumed(name):
    state = make(name).state_dict()
    model = fastunet.convert(state)
    assert model.origin is not None and "norm" not in model.origin.assumed
    assert "option 'norm' is not for the caller to tell" in refusal(state, norm="instance")


def test_a_loss_beside_the_layers_is_nothing_of_the_function(seed):
    network = make("milesial")
    network.criterion = nn.CrossEntropyLoss()
    assert fastunet.convert(network).config == fastunet.convert(make("milesial")).config


def test_a_module_leaves_nothing_to_assume(caplog):
    with caplog.at_level(logging.WARNING, "fastunet.convert"):
        for name in CASES:
            model = fastunet.convert(make(name))
            assert model.origin is not None and model.origin.assumed == {}, name
    assert not caplog.records


def test_who_knows_better_may_tell(seed):
    original = Jvanvugt(padding=True, batch_norm=True).double().eval()
    model = fastunet.convert(original.state_dict(), padding="same")
    assert model.origin is not None and "padding" not in model.origin.assumed
    x = torch.randn(1, 1, 21, 30, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x))
    assert "option 'features' is not for the caller to tell" in refusal(original.state_dict(), features=(3,))
    assert "option 'padding' is not for the caller to tell" in refusal(original, padding="same")
    assert "got 'most'" in refusal(original.state_dict(), padding="most")


def test_nothing_is_told_of_what_tells_itself(tmp_path):
    ours = fastunet.FastUNet(1, 2, (4, 8))
    assert refusal(ours, align_corners=False).startswith("option 'align_corners' is not for the caller to tell of x")
    weights.save(ours, tmp_path / "ours.safetensors")
    message = refusal(tmp_path / "ours.safetensors", padding="same")
    assert message.startswith("option 'padding' is not for the caller to tell of ") and "ours.safetensors" in message
    assert "option 'x' is not for the caller to tell" in refusal(make("milesial").state_dict(), x=1)


def test_dropout_is_said_to_be_left_out():
    model = fastunet.convert(basic_unet(dropout=0.25))
    assert "dropout of p=0.25 is left out, which acts in train mode alone" in str(model.origin)


def changed(network: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> nn.Module:
    """The network with its first module of a kind replaced."""
    name, old = next((name, module) for name, module in network.named_modules() if type(module) is kind)
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, make(old))
    return network


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (partial(basic_unet, act="gelu"), "expected ReLU or LeakyReLU, got GELU"),
        (
            lambda: changed(make("milesial"), nn.ReLU, lambda old: nn.LeakyReLU(0.2)),
            "activation: expected the same throughout, got 0.2, None",
        ),
        (
            lambda: changed(make("milesial"), nn.BatchNorm2d, lambda old: nn.BatchNorm2d(old.num_features, eps=1e-3)),
            "eps: expected the same throughout, got 0.001, 1e-05",
        ),
        (
            lambda: changed(make("milesial"), nn.MaxPool2d, lambda old: nn.AvgPool2d(2)),
            "module 'down1.maxpool_conv.0': expected 2x2 max-pooling, got AvgPool2d",
        ),
        (
            lambda: changed(make("milesial bilinear"), nn.Upsample, lambda old: nn.Upsample(None, 2, "bicubic")),
            "module 'up1.up': expected to double by bilinear or nearest",
        ),
        (
            lambda: changed(
                make("milesial"),
                nn.Conv2d,
                lambda old: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=False),
            ),
            "module 'inc.double_conv.0': expected a plain, zero-padded 3x3 convolution",
        ),
        (
            lambda: changed(make("milesial"), nn.Conv2d, lambda old: nn.Conv2d(3, 4, 3, bias=False)),
            "convolutions: expected all to pad by 1, or none to pad",
        ),
        (
            partial(basic_unet, norm=("batch", {"track_running_stats": False})),
            "module 'conv_0.conv_0.adn.N': expected BatchNorm2d or InstanceNorm2d, with the usual statistics",
        ),
        (partial(plain_conv_unet, ((1, 1), (3, 3), (2, 2))), ""),
        (partial(basic_unet, norm="instance"), "module 'conv_0.conv_0.adn.N': expected a norm with weights"),
        (partial(plain_conv_unet, norm_op_kwargs={}), "module 'encoder.stages.0.0.convs.0.norm': expected a norm with"),
        (
            lambda: changed(make("milesial"), nn.BatchNorm2d, lambda old: nn.InstanceNorm2d(old.num_features)),
            "module 'inc.double_conv.1': expected a norm with weights",
        ),
        (
            partial(basic_unet, norm=("group", {"num_groups": 1})),
            "module 'conv_0.conv_0.adn.N': expected BatchNorm2d or InstanceNorm2d, with the usual statistics",
        ),
        (partial(basic_unet, norm=("localresponse", {"size": 3})), "module 'conv_0.conv_0.adn.N': expected a conv"),
        (partial(basic_unet, act="swish"), "module 'conv_0.conv_0.adn.A': expected a convolution"),
        (partial(basic_unet, act="mish"), "module 'conv_0.conv_0.adn.A': expected a convolution"),
        (
            partial(plain_conv_unet, nonlin=nn.Identity, nonlin_kwargs={}),
            "activations: expected submodules that are ReLU or LeakyReLU, found none",
        ),
    ],
    ids=[
        *("activation", "activations", "eps", "pool", "upsample", "padding mode", "padding", "statistics", "stride 3"),
        *("bare instance norm", "nnunet's", "one bare norm", "group norm", "other norm", "swish", "mish", "none"),
    ],
)
def test_submodules_that_do_something_else_are_named(network, named):
    if not named:  # not a refusal: a stride of 3 can be said
        assert fastunet.convert(network()).config.strides == ((3, 3), (2, 2))
        return
    assert named in refusal(network())


# --- what is refused -------------------------------------------------------------------------


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


# --- files that nobody should trust ----------------------------------------------------------


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trace, "ran")


@pytest.mark.parametrize("place", ["beside", "in place of the weights", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused(place, tmp_path):
    state, trace = make("milesial").state_dict(), tmp_path / "trace"
    content = {**state, "mask_values": Payload(trace)} if place == "beside" else {"network_weights": Payload(trace)}
    data = io.BytesIO()
    pickle.dump(content, data) if place == "plain pickle" else torch.save(content, data)
    if place == "plain pickle":
        pickle.loads(data.getvalue())  # it does run ...
        trace.unlink()
    (tmp_path / "theirs.pth").write_bytes(data.getvalue())
    message = refusal(tmp_path / "theirs.pth")
    assert "refused" in message and "weights_only" not in message
    assert not trace.exists()  # ... and here does not


def test_damaged_safetensors_are_refused(tmp_path):
    path = tmp_path / "theirs.safetensors"
    save_file(make("milesial").state_dict(), path)
    whole = path.read_bytes()
    assert fastunet.convert(path).config.features == (4, 8, 16, 32, 64)
    for kept in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:kept])
        assert "not a usable safetensors file" in refusal(path)


@pytest.mark.parametrize("length", [2**20, 2**40, 2**63, 2**64 - 1], ids=str)
def test_a_huge_header_is_refused(length, tmp_path):
    """Eight bytes claim a header larger than the file, or than memory."""
    path = tmp_path / "theirs.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    assert "not a usable safetensors file" in refusal(path)


def test_offsets_beyond_the_file_are_refused(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path = tmp_path / "theirs.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert "not a usable safetensors file" in refusal(path)


def test_no_such_file(tmp_path):
    assert refusal(tmp_path / "none.pth") == f"{tmp_path / 'none.pth'}: no such file"
