"""FastUNet: the reference network's constructor, parameters and results, on fused operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import dispatch, ops
from .reference import UNet, activate_


class FastUNet(UNet):
    """A drop-in :class:`fastunet.reference.UNet`: same arguments, same state_dict, same function.

    (N, in_channels, H, W) of any strides -> logits (N, out_channels, H, W), channels_last.

    In eval mode without gradients the weights are laid out for the kernels once, with batch norm
    folded into them, and again whenever a parameter or running statistic changes. Changes are
    seen through the tensors' version counters: an optimiser step, ``load_state_dict``, ``copy_``
    under ``no_grad`` all count. Writing in place through ``.data`` bypasses the counter; call
    :meth:`refresh` after it.

    Forward hooks on inner modules do not run: the operators take their parameters and pass them by.
    So shard the network as a whole, ``fully_shard(model)``, not module by module.
    """

    @property
    def _prepared(self) -> dict[nn.Module, _Prepared]:
        return self.__dict__.setdefault("_prepared_weights", {})

    def refresh(self) -> None:
        """Forget the prepared weights; the next forward prepares them anew."""
        self._prepared.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FastUNet:
        # .to(), .half(), .cuda() replace the parameters' memory without counting a version.
        self.refresh()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("_prepared_weights", None)  # copies and pickles prepare their own
        return state

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        if _plain_torch(x) and self._takes_statistics():
            # A CPU's norms want NCHW. Instance norm copies channels_last maps there and back, which costs
            # more than the layout gives; group norm, and batch norm where it trains, take them as they are
            # and sum over their pixels one by one, with up to 300 times the error.
            return super().forward(x).contiguous(memory_format=torch.channels_last)
        skips = []
        for down in self.downs:
            skip, x = self._double_conv(down.conv, x, pool=True)
            skips.append(skip)
        x, _ = self._double_conv(self.bottleneck, x)
        for up in self.ups:
            x = self._up(up, x, skips.pop())
        return ops.conv2d_relu(x, *self._weights(self.head), relu=False)

    def _takes_statistics(self) -> bool:
        """Whether a norm sums over the map it is given, in its forward pass or for its gradients."""
        if self.config.norm != "batch":
            return self.config.norm == "instance"
        norms = (m for m in self.modules() if isinstance(m, nn.BatchNorm2d))
        return any(
            norm.training or norm.running_mean is None or _wants_gradient([*norm.parameters()]) for norm in norms
        )

    def _double_conv(
        self, block: Any, x: Tensor, *, pool: bool = False, skip: Tensor | None = None, mode: str = "none"
    ) -> tuple[Tensor, Tensor]:
        """(feature, pooled feature if ``pool``, else feature again)."""
        layers = list(block.net)
        step = len(layers) // 2  # convolution, [norm], activation
        (conv1, norm1), (conv2, norm2) = ((layers[i], layers[i + 1] if step == 3 else None) for i in (0, step))
        if skip is None:
            x = self._conv_norm(ops.conv2d_relu, conv1, norm1, x)
        else:
            x = self._conv_norm(
                ops.upsample_concat_conv2d_relu,
                conv1, norm1, x, skip, mode=mode, align_corners=self.config.align_corners,
            )  # fmt: skip
        if pool and (norm2 is None or _foldable(conv2, norm2)):
            return self._conv_norm(ops.conv2d_relu, conv2, norm2, x, pool=True)
        x = self._conv_norm(ops.conv2d_relu, conv2, norm2, x)
        return x, F.max_pool2d(x, 2) if pool else x

    def _conv_norm(
        self, op: Callable[..., Any], conv: nn.Module, norm: nn.Module | None, *x: Tensor, **options: Any
    ) -> Any:
        """``op`` with the norm folded into its weights, or followed by the norm."""
        slope = self.config.slope
        if norm is None or _foldable(conv, norm):
            return op(*x, *self._weights(conv, norm), negative_slope=slope, **options)
        return activate_(norm(op(*x, *self._weights(conv), relu=False, **options)), slope)

    def _up(self, up: Any, x: Tensor, skip: Tensor) -> Tensor:
        kind = self.config.upsample
        if kind == "transpose":
            x = ops.conv_transpose2x2(x, *self._weights(up.up))
            mode = "none"
        elif kind == "bilinear_conv":
            # Interpolation weights sum to 1, so a 1x1 convolution commutes with it: a quarter of the work.
            x = ops.conv2d_relu(x, *self._weights(up.up[1]), relu=False)
            mode = "bilinear"
        else:
            mode = kind
        return self._double_conv(up.conv, x, skip=skip, mode=mode)[0]

    def _weights(self, conv: Any, norm: Any = None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias for an operator, ``norm`` folded in."""
        sources = [conv.weight, conv.bias]
        if norm is not None:
            # Training updates the running statistics without counting a version; the batch counter tells.
            sources += [norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked]
        tensors = [t for t in sources if t is not None]
        if torch.compiler.is_compiling() or not _cacheable(tensors):
            return _fold(conv.weight, conv.bias, norm)
        device = conv.weight.device.type
        dtype = conv.weight.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:  # as the operators do
            dtype = torch.get_autocast_dtype(device)
        found = self._prepared.get(conv)
        if found is None or not found.fresh(tensors, dtype):
            found = self._prepared[conv] = _Prepared(conv, norm, tensors, dtype)
        return found.weight, found.bias


def _plain_torch(x: Tensor) -> bool:
    """Whether eager torch on a CPU serves ``x``; compiled code keeps to the operators."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return dispatch.choose(x.device, x.dtype).implementation == "torch"


def _foldable(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the norm is a fixed affine map per channel: batch norm in eval, with statistics.

    Not where their gradients are wanted: through the fold, that of gamma is a difference of large
    sums, with up to 19 times the error of eager's in float16.
    """
    fixed = isinstance(norm, nn.BatchNorm2d) and not norm.training and norm.running_mean is not None
    return fixed and not _wants_gradient([*conv.parameters(), *norm.parameters()])


def _wants_gradient(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _cacheable(tensors: list[Tensor]) -> bool:
    """Prepared weights carry no gradient, and inference tensors no version to tell them stale by.

    Nor where processes work together: FSDP gathers new weights into old memory without counting a version.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    return not _wants_gradient(tensors) and not any(t.is_inference() for t in tensors)


def _fold(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor | None]:
    """norm(conv(x)) as one convolution: scale = gamma / sqrt(var + eps), in float32 or wider."""
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
    folded = weight.to(wide) * scale[:, None, None, None]
    return folded.to(weight.dtype), shift.to(weight.dtype)


class _Prepared:
    """Folded weights in the kernels' layout, and what they were made from."""

    def __init__(self, conv: Any, norm: Any, tensors: list[Tensor], dtype: torch.dtype) -> None:
        # Aliases keep the sources' memory alive, so that a new tensor cannot appear at an old address.
        self.sources = [(t.detach(), t._version) for t in tensors]
        self.dtype = dtype
        # Not inference tensors, even when made in inference mode: autograd may save them later.
        with torch.inference_mode(False), torch.no_grad():
            weight, bias = _fold(conv.weight, conv.bias, norm)
            if isinstance(conv, nn.ConvTranspose2d):
                weight = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
            else:
                weight = weight.contiguous(memory_format=torch.channels_last)
            self.weight = weight.to(dtype)
            self.bias = None if bias is None else bias.to(dtype)

    def fresh(self, tensors: list[Tensor], dtype: torch.dtype) -> bool:
        """Whether nothing changed since."""
        return (
            dtype == self.dtype
            and len(tensors) == len(self.sources)
            and all(
                t.data_ptr() == old.data_ptr() and t._version == version and t.dtype == old.dtype
                for t, (old, version) in zip(tensors, self.sources, strict=True)
            )
        )
