"""Who computes a case: plain PyTorch at its best in several ways, and FastUNet last.

A provider is a function that gets the work of a case, with weights and inputs made, and returns a
call. Settings are all visible here. Each gives a competitor its best shot; what it needs of global
settings it takes for the length of its own calls only.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastunet import FastUNet, ops, reference
from fastunet.config import UNetConfig
from fastunet.reference import DoubleConv, UNet

from .cases import DTYPES, Case
from .work import Call, Operator, Results, Work

# --- the calls of a module: forward alone, or a training step --------------------------------


def _call(
    work: Work,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    compiled: Callable[[Any], Any] = lambda function: function,
) -> Call:
    """One forward without gradients, or one training step."""
    case = work.case
    autocast = functools.partial(torch.autocast, work.device.type, DTYPES[case.dtype], enabled=case.is_mixed)
    if work.target is None:
        run = compiled(module)

        def forward() -> Results:
            with torch.no_grad(), autocast():
                y = run(*inputs)
            return y if isinstance(y, tuple) else (y,)

        return Call(forward)
    target, parameters, scale = work.target, list(module.parameters()), work.loss_scale()
    # Capturable: its step count lives on the device, or no graph could hold the step.
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=True, capturable=work.device.type == "cuda")

    def loss_of(*x: Tensor) -> Tensor:
        with autocast():
            return F.cross_entropy(module(*x).float(), target)

    run = compiled(loss_of)

    def step() -> Results:
        optimiser.zero_grad(set_to_none=True)
        loss = run(*inputs)
        loss.backward(scale)
        optimiser.step()
        return loss.detach(), *(p.grad for p in parameters)  # pyright: ignore[reportReturnType]

    return Call(step, module)


def _channels_last(work: Work) -> tuple[Any, tuple[Tensor, ...]]:
    module = copy.deepcopy(work.module).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return module, tuple(x.contiguous(memory_format=torch.channels_last) for x in work.inputs)


# --- the providers ---------------------------------------------------------------------------


def eager(work: Work) -> Call:
    """Plain PyTorch as it is written: NCHW."""
    return _call(work, copy.deepcopy(work.module), tuple(x.clone() for x in work.inputs))


def eager_channels_last(work: Work) -> Call:
    """NHWC in memory; cudnn.benchmark is on for all (see :func:`settings`)."""
    return _call(work, *_channels_last(work))


def compile_default(work: Work) -> Call:
    """torch.compile as it comes, on channels_last; on a CPU, where max-autotune has nothing to tune, frozen too."""
    call = _call(work, *_channels_last(work), functools.partial(torch.compile, dynamic=False))
    return _frozen(call) if work.target is None and work.device.type == "cpu" else call


def compile_max_autotune(work: Work) -> Call:
    """max-autotune with cuDNN's convolutions."""
    return _max_autotune(work, "ATEN")


def compile_max_autotune_triton(work: Work) -> Call:
    """max-autotune with Inductor's Triton convolutions too."""
    return _max_autotune(work, "ATEN,TRITON")


def _max_autotune(work: Work, convolutions: str) -> Call:
    # Graph replay is measured apart, for every provider alike. Coordinate descent is off: it has corrupted the
    # timings it tunes by (pytorch issue 159525).
    options = {
        "max_autotune": True,
        "max_autotune_conv_backends": convolutions,
        "conv_1x1_as_mm": True,
        "triton.cudagraphs": False,
        "coordinate_descent_tuning": False,
    }
    if work.target is not None:
        options["force_layout_optimization"] = True  # which Inductor leaves out where a U-Net trains
    call = _call(work, *_channels_last(work), functools.partial(torch.compile, dynamic=False, options=options))
    return _frozen(call) if work.target is None else call


def _frozen(call: Call) -> Call:
    """Weights become constants of the compiled code, which may fold and pack them: norms, layouts."""
    # Constants are folded where the global configuration says so during tracing: as an option, freezing is lost.
    with torch._inductor.config.patch(freezing=True):
        call()
    return call


def cudnn_fused(work: Work) -> Call:
    """cuDNN's own convolution with bias and ReLU, batch norms folded into it, channels_last; CUDA inference only."""
    module, inputs = _channels_last(work)
    dtype = DTYPES[work.case.dtype]
    if isinstance(module, UNet):
        module = _without_norms(module.float()).to(dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def conv(x: Tensor, weight: Tensor, bias: Tensor, slope: float) -> Tensor:
        pad = [weight.shape[-1] // 2] * 2
        if slope == 0 and x.shape[1] >= 8:
            return torch.cudnn_convolution_relu(x, weight, bias, [1, 1], pad, [1, 1], 1)
        # cuDNN has no fused engine for the stem's one or three channels in NHWC.
        y = F.conv2d(x, weight, bias, padding=pad[0])
        return y.relu_() if slope == 0 else y

    def operator(*x: Any) -> Any:
        z = x[0] if len(x) == 1 else reference.upsample_concat(x[0], x[1], module.mode, module.corners)
        y = conv(z, module.weight, module.bias, 0.0 if module.relu else 1.0)
        return (y, F.max_pool2d(y, 2)) if module.op == "conv2d_relu_pool" else y

    def network(*x: Any) -> Any:
        return _unet_of(module, conv, x[0].to(dtype))  # which autocast would do at each convolution

    return _call(work, _Function(operator if isinstance(module, Operator) else network), inputs)


def _without_norms(unet: UNet) -> UNet:
    """Fold each batch norm, as in eval mode, into the convolution before it; in place."""
    for block in unet.modules():
        if isinstance(block, DoubleConv):
            layers: list[Any] = []
            for layer in block.net:
                if isinstance(layer, nn.BatchNorm2d):
                    layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
                else:
                    layers.append(layer)
            block.net = nn.Sequential(*layers)
    return unet


def _unet_of(
    unet: UNet,
    conv: Callable[..., Tensor],
    x: Tensor,
    *,
    conv_pool: Callable[..., tuple[Tensor, Tensor]] | None = None,
    upsample_concat: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """A U-Net without norm, of parts.

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


def _is_plain(config: UNetConfig, *upsamplings: str) -> bool:
    """Whether only widths and upsampling differ from the seed's network, so that ``_unet_of`` can run it."""
    free = {"in_channels": 1, "out_channels": 2, "features": (64, 128), "decoder_features": None}
    free |= {"upsample": "bilinear", "align_corners": True}
    return config.upsample in upsamplings and dataclasses.replace(config, **free) == UNetConfig(features=(64, 128))


def _cudnn_serves(case: Case, device: str) -> bool:
    """Inference by plain convolutions of 16-bit dtypes and tf32, on CUDA."""
    config = dataclasses.replace(case.config, norm=None) if case.config.norm == "batch" else case.config
    plain = _is_plain(config, "bilinear", "nearest", "bilinear_conv", "transpose")
    convolves = case.operator is None or "conv2d" in case.layers[0].op
    return device == "cuda" and plain and convolves and case.kind != "train" and case.dtype != "fp32"


def _is_rung(case: Case, device: str) -> bool:
    return case.kind == "infer" and _is_plain(case.config, "bilinear", "nearest")


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
    """cudnn.benchmark on, and tf32 on for everything but fp32; as it was, afterwards.

    A compiled function that Dynamo gives up on raises, where it would run eager under its name.
    """
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype != "fp32"
    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
