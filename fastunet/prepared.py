"""Weights as the operators take them: batch norm folded in, laid out for the kernels, made once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .graph import in_a_users_capture
from .ops.common import rounded, rounds_to_tf32
from .ops.operator import someone_looks_on
from .sources import Sources

How = tuple[torch.dtype, bool, bool]  # dtype, whether the norm's factors are apart, whether rounded to tf32


def prepare(
    kept: dict[nn.Module, Prepared], x: Tensor, conv: Any, norm: Any = None, roll: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias for an operator on ``x``, ``norm`` folded in, the last ``roll`` input channels first.

    ``kept``: those of other calls, by convolution; taken from there while they hold, else made and put there.
    """
    weight, bias = conv.weight, conv.bias
    sources = [weight, bias]
    if norm is not None:
        # Training updates the running statistics without counting a version; the batch counter tells.
        sources += [norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked]
    tensors = [t for t in sources if t is not None]
    device, dtype = weight.device.type, weight.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # as the operators do
        dtype = torch.get_autocast_dtype(device)
    # Products of weights and factors would be rounded to 16 bits; the gradient of x wants them all the same.
    apart = norm is not None and dtype in (torch.float16, torch.bfloat16) and not wants_gradient([x])
    if torch.compiler.is_compiling() or not cacheable(tensors) or in_a_users_capture(weight):
        return fold(_rolled(weight, roll), bias, norm, apart)
    found = kept.get(conv)
    if found is None or not found.sources.are(tensors):
        found = Prepared(tensors)
    # Who looks on would see memory that no operator fills; the operators round for themselves then.
    how = dtype, apart, rounds_to_tf32(weight.device, dtype) and not someone_looks_on()
    if how not in found.weights:
        found.add(how, conv, norm, roll)
        kept[conv] = found
    return found.weights[how]


class Prepared:
    """A convolution's weight and bias, folded and in the kernels' layout, and what they were made from."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.sources = Sources(tensors)
        self.weights: dict[How, tuple[Tensor, Tensor | None]] = {}

    def add(self, how: How, conv: Any, norm: Any, roll: int) -> None:
        """Make those, finished on return."""
        dtype, apart, to_tf32 = how
        # Not inference tensors, even when made in inference mode: autograd may save them later.
        with torch.inference_mode(False), torch.no_grad():
            weight, bias = fold(_rolled(conv.weight, roll), conv.bias, norm, apart)
            if isinstance(conv, nn.ConvTranspose2d):
                weight = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
            else:
                weight = weight.contiguous(memory_format=torch.channels_last)
            weight = rounded(weight.to(dtype)) if to_tf32 else weight.to(dtype)
            self.weights[how] = weight, bias if bias is None or apart else bias.to(dtype)
        if weight.is_cuda and not torch.cuda.is_current_stream_capturing():
            # Other streams may be about to read these, or still read those before them, whose memory is let go.
            torch.cuda.synchronize(weight.device)


def laid_out(kept: dict[nn.Module, Prepared]) -> list[Tensor]:
    """All weights and biases that are kept."""
    pairs = (pair for prepared in kept.values() for pair in prepared.weights.values())
    return [t for pair in pairs for t in pair if t is not None]


def fold(weight: Tensor, bias: Tensor | None, norm: Any, apart: bool) -> tuple[Tensor, Tensor | None]:
    """norm(conv(x)) as one convolution: scale = gamma / sqrt(var + eps), in float32 or wider.

    ``apart``: the weight as it is, and scale and shift, (2, O), as the operators' bias.
    """
    if norm is None:
        return weight, bias
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(wide)
    shift = -norm.running_mean.to(wide) if bias is None else bias.to(wide) - norm.running_mean.to(wide)
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(wide)
    if apart:
        return weight, torch.stack([scale, shift])
    folded = weight.to(wide) * scale[:, None, None, None]
    return folded.to(weight.dtype), shift.to(weight.dtype)


def _rolled(weight: Tensor, roll: int) -> Tensor:
    """The last ``roll`` input channels first."""
    return weight.roll(roll, 1) if roll else weight


def foldable(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the norm is a fixed affine map per channel: batch norm in eval, with statistics.

    Not where their gradients are wanted: through the fold, that of gamma is a difference of large
    sums, with up to 19 times the error of eager's in float16.
    """
    fixed = isinstance(norm, nn.BatchNorm2d) and not norm.training and norm.running_mean is not None
    return fixed and not wants_gradient([*conv.parameters(), *norm.parameters()])


def cacheable(tensors: list[Tensor]) -> bool:
    """Prepared weights carry no gradient, and inference tensors no version to tell them stale by.

    Nor where processes work together: FSDP gathers new weights into old memory without counting a version.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    return not wants_gradient(tensors) and not any(t.is_inference() for t in tensors)


def wants_gradient(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
