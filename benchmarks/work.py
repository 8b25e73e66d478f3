"""A case with its numbers: the module and the inputs that every provider gets alike, and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet import ops, reference
from fastunet.parity.fuzz import randomise
from fastunet.reference import UNet

from .cases import DTYPES, Case

Results = tuple[Tensor, ...]

#: Of training in fp16. A cross-entropy's gradient shrinks with the pixels it is a mean of, below fp16's smallest
#: numbers for a batch of large images. A power of 2 rounds nothing; with this one weights' gradients stay far from
#: the largest number too. AdamW divides by the gradients' size, so that the step is the same.
LOSS_SCALE = 2.0**10


@dataclass(frozen=True)
class Call:
    """What is timed. ``run`` returns all results; of a training step the loss and every gradient of the scaled loss.

    ``module`` is the one whose weights a training step changes.
    """

    run: Callable[[], Results]
    module: nn.Module | None = None

    def __call__(self) -> Results:
        return self.run()

    def restart(self, work: Work) -> None:
        """Give a trained module the weights it began with."""
        if self.module is not None:
            self.module.load_state_dict(work.module.state_dict())


@dataclass
class Work:
    """A case with its numbers: the plain module (an operator is one too) and its inputs."""

    case: Case
    module: nn.Module
    inputs: tuple[Tensor, ...]
    target: Tensor | None = None  # classes, for training

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    def loss_scale(self) -> Tensor:
        """The gradient that a training step's backward pass begins with."""
        return torch.tensor(LOSS_SCALE if self.case.dtype == "fp16" else 1.0, device=self.device)


class Operator(nn.Module):
    """One fused operator in plain PyTorch; ``fast`` runs FastUNet's."""

    def __init__(self, case: Case, fast: bool = False) -> None:
        super().__init__()
        (layer,) = case.layers
        self.op, self.fast, self.mode = layer.op, fast, layer.mode
        self.corners = self.mode == "bilinear" and case.config.align_corners
        self.relu = layer.activation is not None
        self.stride, self.padding = layer.stride, layer.padding
        if self.op != "upsample_concat":
            shape = layer.weight_shape
            fan_in = shape[0] if self.op == "conv_transpose2x2" else math.prod(shape[1:])
            self.weight = nn.Parameter(torch.randn(shape) / fan_in**0.5)
            self.bias = nn.Parameter(torch.randn(layer.out_shape[1]))

    def forward(self, *x: Any) -> Any:
        slope = 0.0 if self.relu else 1.0
        options: dict[str, Any] = {"mode": self.mode, "align_corners": self.corners}
        if self.op == "upsample_concat":
            return (ops if self.fast else reference).upsample_concat(*x, **options)
        tensors: Any = (*x, self.weight, self.bias)
        if self.op == "conv_transpose2x2":
            return (ops if self.fast else reference).conv_transpose2x2(*tensors)
        if self.op == "upsample_concat_conv2d_relu":
            if self.fast:
                return ops.upsample_concat_conv2d_relu(*tensors, relu=self.relu, padding=self.padding, **options)
            return reference.upsample_concat_conv2d_relu(*tensors, slope=slope, padding=self.padding, **options)
        pool: Any = self.op == "conv2d_relu_pool"
        how: dict[str, Any] = {"stride": self.stride, "padding": self.padding}
        if self.fast:
            return ops.conv2d_relu(*tensors, relu=self.relu, pool=pool, **how)
        y = reference.conv2d_relu(*tensors, slope=slope, **how)
        return (y, F.max_pool2d(y, 2)) if pool else y


@torch.no_grad()
def keep_size(unet: UNet) -> None:
    """Let batch norms with the weights and statistics of :func:`randomise` keep the size of what goes through.

    Over uniform weights of +-1.5 and variances of 0.5 to 2 the mean of weight**2 / variance is 0.69.
    """
    for module in unet.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight /= 0.69**0.5


def make_work(case: Case, device: torch.device, seed: int) -> Work:
    """Weights and inputs of a case from a seed, in its dtype.

    Weights keep the size of what goes through, and norms are not the identity: with PyTorch's first weights a
    deep level is lost in the roundings of the others, and whether it was computed cannot be seen.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if case.operator is None:
            module = UNet.from_config(case.config)
            randomise(module, seed)
            keep_size(module)
            shapes = [(case.batch, case.config.in_channels, case.height, case.width)]
        else:
            module = Operator(case)
            shapes = list(case.layers[0].in_shapes)
        inputs = [torch.randn(shape) for shape in shapes]
        classes = max(case.config.out_channels, 2)
        target = torch.randint(classes, (case.batch, case.height, case.width))
    dtype = torch.float32 if case.is_mixed else DTYPES[case.dtype]
    module = module.to(device, dtype).train(case.kind == "train")
    return Work(
        case, module, tuple(x.to(device, dtype) for x in inputs), target.to(device) if case.kind == "train" else None
    )
