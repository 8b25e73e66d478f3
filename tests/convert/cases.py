"""Every family and variant: how to make one, and sizes that the original takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fastunet
from fastunet.checkpoint import WeightsError

from .networks import Assembled, Jvanvugt, LeeJunHyun, Listed, Mateuszbuda, Milesial

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of MONAI's own imports
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from monai.networks.nets.basic_unet import BasicUNet


def plain_conv_unet(
    strides: tuple = ((1, 1), (2, 2), (2, 2)), convs: tuple = (2, 2, 2), back: tuple = (2, 2), **options
) -> nn.Module:
    return PlainConvUNet(
        input_channels=2,
        n_stages=len(strides),
        features_per_stage=(4, 6, 8)[: len(strides)],
        conv_op=nn.Conv2d,
        kernel_sizes=3,
        strides=strides,
        n_conv_per_stage=convs,
        num_classes=3,
        n_conv_per_stage_decoder=back,
        **{
            "conv_bias": True,
            "norm_op": nn.InstanceNorm2d,
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": nn.LeakyReLU,
            "nonlin_kwargs": {"inplace": True},
            **options,
        },
    )


basic_unet = partial(BasicUNet, 2, 1, 2, (4, 4, 6, 8, 10, 5))


class Case(NamedTuple):
    family: str
    make: Callable[[], nn.Module]
    size: tuple[int, int]
    any_size: bool = False  # the original takes every size


_BATCH_NORM = {"norm_op": nn.BatchNorm2d, "norm_op_kwargs": {"eps": 1e-3, "momentum": 0.05}}
CASES: dict[str, Case] = {
    "seed two levels": Case("seed", Assembled, (20, 36)),
    "seed four levels": Case("seed", Listed, (32, 48)),
    "milesial": Case("milesial", Milesial, (37, 51), True),
    "milesial bilinear": Case("milesial", partial(Milesial, bilinear=True), (37, 51), True),
    "milesial old": Case("milesial", partial(Milesial, bias=True), (37, 51), True),
    "milesial old bilinear": Case("milesial", partial(Milesial, bias=True, bilinear=True), (37, 51), True),
    "mateuszbuda": Case("mateuszbuda", Mateuszbuda, (32, 48)),
    **{
        f"jvanvugt {'same' if padding else 'valid'}{' norm' * norm}{' transpose' if up else ' bilinear'}": Case(
            "jvanvugt", partial(Jvanvugt, padding=padding, batch_norm=norm, upconv=up), (53, 47), True
        )
        for padding in (False, True)
        for norm in (False, True)
        for up in (False, True)
    },
    "leejunhyun": Case("leejunhyun", LeeJunHyun, (32, 48)),
    "monai": Case("monai", basic_unet, (37, 51), True),
    "monai nontrainable": Case("monai", partial(basic_unet, upsample="nontrainable"), (37, 51), True),
    "monai batch norm": Case("monai", partial(basic_unet, norm="batch", act="relu", bias=False), (37, 51), True),
    "nnunet": Case("nnunet", plain_conv_unet, (20, 28)),
    "nnunet oblong": Case("nnunet", partial(plain_conv_unet, ((1, 1), (2, 2), (2, 1)), (1, 3, 2), (2, 1)), (20, 26)),
    "nnunet batch norm": Case("nnunet", partial(plain_conv_unet, **_BATCH_NORM), (20, 28)),
}


def make(name: str) -> nn.Module:
    """A network with fresh weights, norms that are not the identity, in eval mode."""
    network = CASES[name].make()
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


def image(network: nn.Module, size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    first = next(p for p in network.parameters() if p.ndim == 4)
    return torch.randn(batch, first.shape[1], *size, dtype=first.dtype)


State = dict[str, Any]


def refusal(x: Any, /, **told: Any) -> str:
    """The one line with which :func:`fastunet.convert` refuses ``x``."""
    with pytest.raises(WeightsError) as error:
        fastunet.convert(x, **told)
    message = str(error.value)
    assert "\n" not in message
    return message
