"""Small networks to verify, and faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastunet import FastUNet
from fastunet.reference import UNet

NETWORKS = [
    {},
    {"align_corners": False, "activation": "leaky_relu"},
    {"norm": "batch"},
    {"upsample": "transpose"},
    {"upsample": "bilinear_conv", "norm": "batch"},
    {"upsample": "nearest", "norm": "instance"},
    {"decoder_features": ((5, 7), (9, 6)), "norm": "batch"},
]


def pair(**options) -> tuple[FastUNet, UNet]:
    """A model and a reference of the same weights, batch norm with statistics of its own.

    Weights as He et al. (2015, arXiv:1502.01852) and biases above 0: of torch's own, now and then a network
    has a layer of nothing but dead ReLUs, in which no fault shows.
    """
    model = FastUNet(2, 3, (4, 6, 8), **options)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.uniform_(module.bias, 0.1, 0.5)
    if options.get("norm") == "batch":
        with torch.no_grad():
            model(3 * torch.randn(2, 2, 16, 16) + 1)
    plain = UNet(2, 3, (4, 6, 8), **options)
    plain.load_state_dict(model.state_dict())
    return model.eval(), plain.eval()


class Faulty:
    """A module's functions, some replaced, for one importer alone."""

    def __init__(self, module: Any, **faults: Callable) -> None:
        self.__dict__.update(vars(module) | faults)
