"""What keys do not tell: assumed, told by who knows, or read off the modules."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fastunet
from fastunet import weights

from .cases import CASES, basic_unet, make, plain_conv_unet, refusal
from .networks import Jvanvugt, Milesial


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
    for message, named in (
        (refusal(original.state_dict(), features=(3,)), "option 'features' is not for the caller to tell"),
        (refusal(original, padding="same"), "option 'padding' is not for the caller to tell"),
        (refusal(original.state_dict(), padding="most"), "got 'most'"),
    ):
        assert named in message and "nearest" not in message  # what kind of network it is was not the question


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
