"""Who computes a case: plain PyTorch at its best in several ways, and FastUNet last.

A provider is a function that gets the work of a case, with weights and inputs made, and returns a
call. Settings are all visible here. Each gives a competitor its best shot; what it needs of global
settings it takes for the length of its own calls only.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet import FastUNet, ops, reference
from fastunet.reference import UNet

from .cases import DTYPES, Case

Call = Callable[[], Tensor]


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


class Operator(nn.Module):
    """One fused operator in plain PyTorch; ``fast`` runs FastUNet's."""

    def __init__(self, case: Case, fast: bool = False) -> None:
        super().__init__()
        (layer,) = case.layers
        self.op, self.fast = layer.op, fast
        self.mode = {"transpose": "none", "nearest": "nearest"}.get(case.config.upsample, "bilinear")
        self.corners = self.mode == "bilinear" and case.config.align_corners
        self.relu = layer.name != "head" and not layer.name.endswith("up.1")
        c, out = sum(shape[1] for shape in layer.in_shapes), layer.out_shape[1]
        if self.op == "conv_transpose2x2":
            self.weight = nn.Parameter(torch.randn(c, out, 2, 2) / c**0.5)
        elif self.op != "upsample_concat":
            side = 3 if layer.name != "head" and not layer.name.endswith("up.1") else 1
            self.weight = nn.Parameter(torch.randn(out, c, side, side) / (side * side * c) ** 0.5)
        if self.op != "upsample_concat":
            self.bias = nn.Parameter(torch.randn(out))

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
                return ops.upsample_concat_conv2d_relu(*tensors, relu=self.relu, **options)
            return reference.upsample_concat_conv2d_relu(*tensors, slope=slope, **options)
        pool: Any = self.op == "conv2d_relu_pool"
        if self.fast:
            return ops.conv2d_relu(*tensors, relu=self.relu, pool=pool)
        y = reference.conv2d_relu(*tensors, slope=slope)
        return (y, F.max_pool2d(y, 2)) if pool else y


def make_work(case: Case, device: torch.device, seed: int) -> Work:
    """Weights and inputs of a case from a seed, in its dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if case.operator is None:
            module: nn.Module = UNet.from_config(case.config)
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


# --- the calls of a module: forward alone, or a training step --------------------------------


def _call(work: Work, module: nn.Module, inputs: tuple[Tensor, ...], compiled: dict[str, Any] | None = None) -> Call:
    """One forward without gradients, or one training step that returns the loss."""
    case = work.case
    autocast = functools.partial(torch.autocast, work.device.type, DTYPES[case.dtype], enabled=case.is_mixed)
    if case.kind != "train":
        run = module if compiled is None else torch.compile(module, **compiled)

        def forward() -> Tensor:
            with torch.no_grad(), autocast():
                y = run(*inputs)
            return y[0] if isinstance(y, tuple) else y

        return forward
    assert work.target is not None
    target = work.target
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def loss_of(*x: Tensor) -> Tensor:
        with autocast():
            return F.cross_entropy(module(*x).float(), target)

    run = loss_of if compiled is None else torch.compile(loss_of, **compiled)

    def step() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        loss = run(*inputs)
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def _channels_last(work: Work) -> tuple[Any, tuple[Tensor, ...]]:
    module = copy.deepcopy(work.module).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return module, tuple(x.contiguous(memory_format=torch.channels_last) for x in work.inputs)


# --- the providers ---------------------------------------------------------------------------


def eager(work: Work) -> Call:
    """Plain PyTorch as it is written: NCHW."""
    return _call(work, copy.deepcopy(work.module), work.inputs)


def eager_channels_last(work: Work) -> Call:
    """NHWC in memory; cudnn.benchmark is on for all (see :func:`settings`)."""
    return _call(work, *_channels_last(work))


def compile_default(work: Work) -> Call:
    """torch.compile as it comes, on channels_last."""
    return _call(work, *_channels_last(work), compiled={"dynamic": False})


def compile_max_autotune(work: Work) -> Call:
    """max-autotune with cuDNN's convolutions."""
    options = _inductor(work) | {"max_autotune_conv_backends": "ATEN"}
    return _call(work, *_channels_last(work), compiled={"dynamic": False, "options": options})


def compile_max_autotune_triton(work: Work) -> Call:
    """max-autotune with Inductor's Triton convolutions too."""
    options = _inductor(work) | {"max_autotune_conv_backends": "ATEN,TRITON"}
    return _call(work, *_channels_last(work), compiled={"dynamic": False, "options": options})


def _inductor(work: Work) -> dict[str, Any]:
    # Graph replay is measured apart, for every provider alike.
    options: dict[str, Any] = {"max_autotune": True, "triton.cudagraphs": False, "conv_1x1_as_mm": True}
    # Inductor leaves the layout of U-Nets alone in training; freezing folds constants in inference.
    return options | ({"force_layout_optimization": True} if work.case.kind == "train" else {"freezing": True})


def cudnn_fused(work: Work) -> Call:
    """cuDNN's own convolution with bias and ReLU, channels_last; CUDA inference only."""
    module, inputs = _channels_last(work)

    def conv(x: Tensor, weight: Tensor, bias: Tensor, slope: float) -> Tensor:
        pad = [weight.shape[-1] // 2] * 2
        if slope == 0:
            return torch.cudnn_convolution_relu(x, weight, bias, [1, 1], pad, [1, 1], 1)
        return F.conv2d(x, weight, bias, padding=pad[0])

    def operator(*x: Any) -> Any:
        z = x[0] if len(x) == 1 else reference.upsample_concat(x[0], x[1], module.mode, module.corners)
        y = conv(z, module.weight, module.bias, 0.0 if module.relu else 1.0)
        return (y, F.max_pool2d(y, 2)) if module.op == "conv2d_relu_pool" else y

    def network(*x: Any) -> Any:
        return _unet_of(module, conv, x[0])

    return _call(work, _Function(operator if isinstance(module, Operator) else network), inputs)


def _unet_of(
    unet: UNet,
    conv: Callable[..., Tensor],
    x: Tensor,
    *,
    conv_pool: Callable[..., tuple[Tensor, Tensor]] | None = None,
    upsample_concat: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """A U-Net without norm or learned upsampling, of parts.

    Args:
        conv: ``conv(x, weight, bias, slope)``.
        conv_pool: the same with the max-pool as a second result; torch's after ``conv`` by default.
        upsample_concat: of x and skip; torch's by default.
    """
    slope = unet.config.slope

    def weights(block: Any, index: int) -> tuple[Tensor, Tensor, float]:
        return block.net[index].weight, block.net[index].bias, slope

    skips = []
    for down in unet.downs:
        block: Any = down.conv
        x = conv(x, *weights(block, 0))
        if conv_pool is None:
            skip = conv(x, *weights(block, 2))
            x = F.max_pool2d(skip, 2)
        else:
            skip, x = conv_pool(x, *weights(block, 2))
        skips.append(skip)
    for index in (0, 2):
        x = conv(x, *weights(unet.bottleneck, index))
    for up in unet.ups:
        skip = skips.pop()
        if upsample_concat is None:
            x = torch.cat([reference.pad_to(up.up(x), *skip.shape[2:]), skip], 1)  # pyright: ignore[reportCallIssue]
        else:
            x = upsample_concat(x, skip)
        for index in (0, 2):
            x = conv(x, *weights(up.conv, index))
    return conv(x, unet.head.weight, unet.head.bias, 1.0)


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Any:
        return self.function(*x)


# The rungs of the ladder between torch and FastUNet: one more fused operator each.


def step_conv(work: Work) -> Call:
    """Our convolution with bias and ReLU; pool, upsampling and concatenation are torch's."""
    return _rung(work)


def step_pool(work: Work) -> Call:
    """The max-pool comes with the convolution; upsampling and concatenation are torch's."""
    return _rung(work, pool=True)


def step_concat(work: Work) -> Call:
    """Upsampling and concatenation are one kernel too, but the concatenated map is materialised."""
    return _rung(work, pool=True, concat=True)


def _rung(work: Work, *, pool: bool = False, concat: bool = False) -> Call:
    module, inputs = _channels_last(work)
    config = work.case.config

    def conv(x: Tensor, weight: Tensor, bias: Tensor, slope: float, pool: Any = False) -> Any:
        return ops.conv2d_relu(x, weight, bias, relu=slope != 1, pool=pool)

    def upsample_concat(x: Tensor, skip: Tensor) -> Tensor:
        return ops.upsample_concat(x, skip, mode=config.upsample, align_corners=config.align_corners)

    parts: dict[str, Any] = {}
    if pool:
        parts["conv_pool"] = functools.partial(conv, pool=True)
    if concat:
        parts["upsample_concat"] = upsample_concat
    return _call(work, _Function(lambda x: _unet_of(module, conv, x, **parts)), inputs)


def fastunet(work: Work) -> Call:
    """FastUNet: every operator fused."""
    module, inputs = _channels_last(work)
    if isinstance(module, UNet):
        fast: nn.Module = FastUNet.from_config(work.case.config)
    else:
        fast = Operator(work.case, fast=True)
    fast.load_state_dict(module.state_dict())
    parameter = next(module.parameters(), work.inputs[0])
    fast = fast.to(work.device, parameter.dtype).train(module.training)
    return _call(work, fast.to(memory_format=torch.channels_last), inputs)  # pyright: ignore[reportCallIssue]


def _anywhere(case: Case, device: str) -> bool:
    return True


def _cuda_alone(case: Case, device: str) -> bool:
    return device == "cuda"


def _cudnn_serves(case: Case, device: str) -> bool:
    """Plain convolutions of 16-bit dtypes and tf32 on CUDA, no norm, no training."""
    plain = case.config.norm is None and all(
        layer.op.startswith(("conv2d", "upsample_concat_c")) for layer in case.layers
    )
    return device == "cuda" and plain and case.kind != "train" and case.dtype != "fp32"


def _is_rung(case: Case, device: str) -> bool:
    c = case.config
    return case.kind == "infer" and c.norm is None and c.slope == 0 and c.upsample in ("bilinear", "nearest")


@dataclass(frozen=True)
class Provider:
    """A named way to compute a case, and which cases it serves on a device type."""

    name: str
    prepare: Callable[[Work], Call]
    serves: Callable[[Case, str], bool] = _anywhere


PROVIDERS = (
    Provider("eager", eager),
    Provider("eager channels_last", eager_channels_last),
    Provider("cudnn fused", cudnn_fused, _cudnn_serves),
    Provider("compile", compile_default),
    Provider("compile max-autotune", compile_max_autotune, _cuda_alone),
    Provider("compile max-autotune triton", compile_max_autotune_triton, _cuda_alone),
    Provider("fastunet conv+relu", step_conv, _is_rung),
    Provider("fastunet conv+relu+pool", step_pool, _is_rung),
    Provider("fastunet upsample+concat", step_concat, _is_rung),
    Provider("fastunet", fastunet),
)
#: FastUNet and the steps on the way to it; the others are its competitors.
OURS = tuple(provider.name for provider in PROVIDERS if provider.name.startswith("fastunet"))


@contextlib.contextmanager
def settings(dtype: str) -> Iterator[None]:
    """cudnn.benchmark on, and tf32 on for everything but fp32; as it was, afterwards."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype != "fp32"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
