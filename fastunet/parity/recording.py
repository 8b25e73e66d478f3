"""What a network does on its way: the result of each layer, and which way each ReLU and max-pool went.

A U-Net is piecewise linear. A pre-activation within a rounding of 0 takes the other side of the
ReLU, and the gradient there is wrong by all of it, in any implementation and at other pixels in
each. So the sides that a network took are recorded, and the float64 truth of *its* gradients takes
the same: what is left between the two is rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..model import FastUNet
from ..reference import UNet
from ..trace import trace

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_LEAKY_RELUS = {F.leaky_relu, F.leaky_relu_}
_IN_PLACE = {F.relu_, torch.relu_, Tensor.relu_, F.leaky_relu_}


class OtherDecisions(ValueError):
    """A network met another ReLU or max-pool than the one whose decisions it is to repeat."""


class Recorder(TorchFunctionMode):
    """Within the block, keeps the results of fused operators and the decisions of every operator.

    A decision is, of a ReLU, the elements that stay as they are, and of a max-pool the places of
    its maxima.
    """

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []
        self.decisions: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.max_pool2d:
            self.decisions.append(_places(*args, **kwargs))
        result = func(*args, **kwargs)
        if func in _RELUS or func in _LEAKY_RELUS:
            self.decisions.append(result.detach() > 0)
        elif getattr(func, "namespace", None) == "fastunet":
            y, *pooled = result if isinstance(result, tuple) else (result,)
            self.results.append(y.detach())
            if func.name() != "fastunet::conv_transpose2x2" and args[-1] != 1:  # a slope of 1 is no activation
                self.decisions.append(y.detach() > 0)
            if pooled:
                self.decisions.append(_places(y, 2))
        return result


class Replay(TorchFunctionMode):
    """Within the block, every ReLU and max-pool decides as recorded, whatever its input."""

    def __init__(self, decisions: Sequence[Tensor]) -> None:
        super().__init__()
        self._left = list(decisions)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RELUS or func in _LEAKY_RELUS:
            x = args[0]
            kept = self._next(torch.bool, x.shape)
            slope = 0.0
            if func in _LEAKY_RELUS:
                slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
            factor = torch.where(kept, 1.0, slope).to(x.dtype)
            return x.mul_(factor) if func in _IN_PLACE else x * factor
        if func is F.max_pool2d:
            x = args[0]
            places = self._next(torch.int64, x.shape[:2])
            return x.flatten(2).gather(2, places.flatten(2)).view(places.shape)
        return func(*args, **kwargs)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if self._left and exception[0] is None:
            raise OtherDecisions(f"{len(self._left)} more ReLUs and max-pools in the model than in the reference")

    def _next(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        decision = self._left.pop(0) if self._left else None
        if decision is None or decision.dtype != dtype or decision.shape[: len(shape)] != tuple(shape):
            kind = "ReLU" if dtype == torch.bool else "max-pool"
            raise OtherDecisions(f"the reference has a {kind} of {tuple(shape)} where the model has none")
        return decision


def _places(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kwargs.pop("return_indices", None)
    return F.max_pool2d_with_indices(x.detach(), *args, **kwargs)[1]


def run_with_layers(network: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and, of a network of ours, the result of each fused operator by its layer's name."""
    if not isinstance(network, UNet):
        return network(x), {}
    names = [layer.name for layer in trace(network.config, *x.shape[-2:], batch=len(x))]
    if isinstance(network, FastUNet):
        with Recorder() as recorder:
            y = network(x)
        # Instance norm on a CPU runs the reference, without an operator.
        return y, dict(zip(names, recorder.results, strict=True)) if recorder.results else {}
    layers: dict[str, Tensor] = {}
    # What the operators return: with a norm folded in or none, the activation; else the convolution.
    fused = network.config.norm is None or (network.config.norm == "batch" and not network.training)
    after = 0 if not fused else 1 if network.config.norm is None else 2
    handles = []
    for name in names:
        parent, _, last = name.rpartition(".")
        if parent.endswith(".up"):  # a 1x1 convolution, which FastUNet runs before the upsampling

            def commuted(module: Any, inputs: Any, _: Tensor, name: str = name) -> None:
                layers[name] = module[1](inputs[0])

            handles.append(network.get_submodule(parent).register_forward_hook(commuted))
        else:
            at = f"{parent}.{int(last) + after}" if last.isdigit() else name

            def keep(module: Any, inputs: Any, output: Tensor, name: str = name) -> None:
                layers[name] = output.clone()  # an activation follows in place

            handles.append(network.get_submodule(at).register_forward_hook(keep))
    y = network(x)
    for handle in handles:
        handle.remove()
    return y, layers


def gradients(network: nn.Module, x: Tensor, cotangent: Tensor, mode: Recorder | Replay) -> dict[str, Tensor]:
    """Gradients of ``sum(cotangent * network(x))``, in the order in which backward meets them.

    Those of the parameters that require one, by their names, the last layer's first; then ``"input"``.
    """
    x = x.detach().requires_grad_()
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    names = [*reversed(parameters), "input"]
    with torch.enable_grad():
        with mode:
            y = network(x)
        found = torch.autograd.grad(y, [*reversed(parameters.values()), x], cotangent, allow_unused=True)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


def gradients_and_terms(
    network: nn.Module, x: Tensor, cotangent: Tensor, decisions: Sequence[Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """:func:`gradients` with imposed decisions, and for each parameter what :func:`compare` calls terms.

    A parameter's gradient is a sum over pixels. Where its terms cancel (behind a norm that uses the
    batch's statistics that of a bias is 0), the result's size says nothing of its rounding errors.
    """
    calls: list[tuple[str, Any, Tensor, Callable[[], Tensor]]] = []
    handles = []
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d)):

            def keep(module: Any, inputs: Any, output: Tensor, name: str = name) -> None:
                gradient: list[Tensor] = []
                output.register_hook(gradient.append)
                calls.append((name, module, inputs[0].detach(), lambda: gradient[0]))

            handles.append(module.register_forward_hook(keep))
    found = gradients(network, x, cotangent, Replay(decisions))
    for handle in handles:
        handle.remove()
    terms: dict[str, float] = {}
    for name, module, inputs, gradient in calls:
        parameters = {key: p for key, p in module.named_parameters(recurse=False) if f"{name}.{key}" in found}
        if not parameters:
            continue
        # Linear in the parameters: with squared factors, the sums are those of the terms' squares.
        linear = isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
        y = module(inputs**2) if linear else _norm_of_squares(module, inputs)
        for key, squares in zip(
            parameters, torch.autograd.grad(y, list(parameters.values()), gradient() ** 2), strict=True
        ):
            terms[f"{name}.{key}"] = squares.max().sqrt().item()
    return found, terms


def _norm_of_squares(norm: Any, x: Tensor) -> Tensor:
    """scale * squares + shift, the squares being those of what a norm subtracts: x / sigma and mean / sigma."""
    dims = (2, 3) if isinstance(norm, nn.InstanceNorm2d) else (0, 2, 3)
    if isinstance(norm, nn.BatchNorm2d) and not norm.training and norm.running_var is not None:
        mean, variance = norm.running_mean[:, None, None], norm.running_var[:, None, None]
    else:
        mean, variance = x.mean(dims, keepdim=True), x.var(dims, unbiased=False, keepdim=True)
    squares = (x**2 + mean**2) / (variance + norm.eps)
    return squares * norm.weight[:, None, None] + norm.bias[:, None, None]
