"""What a network does on its way: the result of each layer, and which way each ReLU and max-pool went.

A U-Net is piecewise linear. A pre-activation within a rounding of 0 takes the other side of the
ReLU, and the gradient there is wrong by all of it, in any implementation and at other pixels in
each. So the sides that a network took are recorded, and the float64 truth of *its* gradients takes
the same: what is left between the two is rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import ops
from ..config import UNetConfig
from ..model import FastUNet
from ..reference import UNet, activate_
from ..trace import Layer, trace

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_LEAKY_RELUS = {F.leaky_relu, F.leaky_relu_}
_CONVOLUTIONS = {torch.ops.aten.conv2d.default, torch.ops.aten.conv_transpose2d.input}  # as FastUNet calls them
_IN_PLACE = {F.relu_, torch.relu_, Tensor.relu_, F.leaky_relu_}


class OtherDecisions(ValueError):
    """A network met another ReLU or max-pool than the one whose decisions it is to repeat."""


class Recorder(TorchFunctionMode):
    """Within the block, keeps the results of a FastUNet's layers and the decisions of every operator.

    A decision is, of a ReLU, the elements that stay as they are, and of a max-pool the places of
    its maxima.
    """

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []
        self.pooled: dict[int, Tensor] = {}  # by the place in results of what was pooled
        self.decisions: list[Tensor] = []

    def __enter__(self) -> Any:
        self._through_operators = ops.watched()
        self._through_operators.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._through_operators.__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.max_pool2d:
            self.decisions.append(_places(*args, **kwargs))
        result = func(*args, **kwargs)
        if func in _RELUS or func in _LEAKY_RELUS:
            self.decisions.append(result.detach() > 0)
        elif func in _CONVOLUTIONS:
            self.results.append(result.detach())  # an activation that follows in place is in it
        elif getattr(func, "namespace", None) == "fastunet":
            y, *pooled = result if isinstance(result, tuple) else (result,)
            self.results.append(y.detach())
            if func.name() != "fastunet::conv_transpose2x2" and args[-1] != 1:  # a slope of 1 is no activation
                self.decisions.append(y.detach() > 0)
            if pooled:
                self.pooled[len(self.results) - 1] = pooled[0].detach()
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


def run_with_layers(network: nn.Module, x: Tensor, config: UNetConfig | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and the result of each fused operator by its layer's name, in order.

    A max-pool that came with a layer is there by its own name, ``"downs.0.pool"``.

    Args:
        config: of the U-Net that names the layers: a network of another class shows those of its
            modules that have such a name. None for a network without.
    """
    if config is None:
        return network(x), {}
    layers_of_it = trace(config, *x.shape[-2:], batch=len(x))
    names = [layer.name for layer in layers_of_it]
    pools = _pools_after(config, names)
    if isinstance(network, FastUNet):
        with Recorder() as recorder:
            y = network(x)
        layers: dict[str, Tensor] = {}
        if recorder.results:  # with instance norm a CPU runs the reference, without an operator
            for index, (name, result) in enumerate(zip(names, recorder.results, strict=True)):
                layers[name] = result
                if index in recorder.pooled:
                    layers[pools[name]] = recorder.pooled[index]
        return y, layers
    found: dict[str, Tensor] = {}
    handles = []
    for name, traced in zip(names, layers_of_it, strict=True):
        layer, norm = _module(network, name), _norm_after(network, traced)
        if layer is None:
            continue
        parent = name.rpartition(".")[0]
        if parent.endswith(".up") and traced.activation is None:
            # A 1x1 convolution, which FastUNet runs before the upsampling.
            def commuted(module: Any, inputs: Any, _: Tensor, name: str = name, conv: Any = layer) -> None:
                found[name] = conv(inputs[0])

            handles.append(network.get_submodule(parent).register_forward_hook(commuted))
            continue
        # What the operator returns: the activation, unless a norm that it cannot hold stands before it.
        apart = norm is not None and config.order == "conv_norm_act" and not _is_folded(norm, config)
        shown = layer if apart or traced.activation is None else _module(network, traced.activation)

        def keep(module: Any, inputs: Any, output: Tensor, name: str = name) -> None:
            found[name] = output.clone()  # an activation follows in place

        if shown is not None:
            handles.append(shown.register_forward_hook(keep))
    for pool in pools.values():

        def keep_pooled(module: Any, inputs: Any, output: Tensor, name: str = pool) -> None:
            found[name] = output

        module = _module(network, pool)
        if module is not None:
            handles.append(module.register_forward_hook(keep_pooled))
    try:
        y = network(x)
    finally:
        for handle in handles:
            handle.remove()
    return y, found


def _module(network: nn.Module, name: str) -> nn.Module | None:
    try:
        return network.get_submodule(name)
    except AttributeError:
        return None


def _pools_after(config: UNetConfig, names: Sequence[str]) -> dict[str, str]:
    """The name of the max-pool behind each encoder level's last layer."""
    if config.downsample != "max_pool":
        return {}
    return {name: f"{level}.pool" for level, name in _last_of_levels(names).items()}


def _last_of_levels(names: Sequence[str]) -> dict[str, str]:
    """The last layer of each encoder level, by its name."""
    return {name.split(".conv.")[0]: name for name in names if name.startswith("downs.")}


@dataclass(frozen=True)
class Terms:
    """What :func:`compare` calls terms, of a network's layers.

    Attributes:
        of_layers: by name, max-pools by theirs.
        lost: for each layer, how many times larger the terms of its inputs were than the inputs
            are. A map of few elements may be small because its sums cancel, and then its errors,
            and those of all maps made of it, are as large as its terms were.
        smallest: the working dtype's smallest normal number, whose errors smaller ones have.
    """

    of_layers: dict[str, float]
    lost: dict[str, float]
    smallest: float

    @property
    def most_lost(self) -> float:
        return max(self.lost.values(), default=1.0)


def terms_of_layers(network: nn.Module, x: Tensor, smallest: float) -> Terms:
    """:class:`Terms` of a reference of ours; none for another network."""
    if not isinstance(network, UNet):
        return Terms({}, {}, smallest)
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    config = network.config
    layers = trace(config, *x.shape[-2:], batch=len(x))
    names = [layer.name for layer in layers]
    for name in names:

        def keep(module: Any, inputs: Any, y: Tensor, name: str = name) -> None:
            calls[name] = inputs[0], y.clone()

        handles.append(network.get_submodule(name).register_forward_hook(keep))
    network(x)
    for handle in handles:
        handle.remove()

    terms: dict[str, float] = {}
    before: dict[str, float] = {}
    skips: list[tuple[int, float]] = []  # channels and loss of each encoder level's map
    lost, pools = 1.0, _pools_after(config, names)
    last_of_level = set(_last_of_levels(names).values())
    for layer, name in zip(layers, names, strict=True):
        inputs, y = calls[name]
        if not y.numel():
            continue
        conv: Any = network.get_submodule(name)
        losses = torch.full((inputs.shape[1], 1, 1), lost, dtype=inputs.dtype, device=inputs.device)
        if name.startswith("ups.") and name.endswith(".conv.net.0"):
            channels, lost_of_skip = skips.pop()
            if config.concat == "upsampled_first":
                losses[-channels:] = lost_of_skip
            else:
                losses[:channels] = lost_of_skip
        before[name] = losses.max().item()
        factors = {key: p**2 for key, p in conv.named_parameters()}
        squares = (inputs**2).clamp(min=smallest**2) * losses**2
        roots = torch.func.functional_call(conv, factors, squares).amax((0, 2, 3)).sqrt()
        terms[name] = roots.max().item()
        norm = _norm_after(network, layer)
        if norm is not None and config.order == "conv_act_norm":
            y = activate_(y, config.slope)
        if norm is not None and norm.weight is not None:
            mean, variance = (t.flatten(1) for t in _mean_and_variance(norm, y))
            normed = (roots**2 + mean**2) * norm.weight**2 / (variance + norm.eps) + norm.bias**2
            roots = normed.amax(0).sqrt()
            y = norm(y)
            if _is_folded(norm, config):
                terms[name] = roots.max().item()
        if layer.activation is not None and (norm is None or config.order == "conv_norm_act"):
            y = activate_(y, config.slope)
        largest = y.abs().max().item()
        lost = max(1.0, roots.max().item() / largest if largest else lost)
        if name in pools:
            terms[pools[name]] = roots.max().item() if config.order == "conv_act_norm" else terms[name]
        if name in last_of_level:
            skips.append((y.shape[1], lost))
    return Terms(terms, before, smallest)


def _norm_after(network: nn.Module, layer: Layer) -> Any:
    """The norm behind a layer's convolution, or None."""
    return None if layer.norm is None else _module(network, layer.norm)


def _is_folded(norm: Any, config: UNetConfig) -> bool:
    """Whether FastUNet's operator holds the norm and the activation behind it."""
    fixed = isinstance(norm, nn.BatchNorm2d) and not norm.training and norm.running_mean is not None
    return fixed and config.order == "conv_norm_act"


def gradients(
    network: nn.Module, x: Tensor, cotangent: Tensor, mode: Recorder | Replay
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """``network(x)``, and the gradients of ``sum(cotangent * network(x))`` in the order in which backward meets them.

    Those of the parameters that require one, by their names, the last layer's first; then
    ``"input"``. None for what the output does not depend on.
    """
    x = x.detach().requires_grad_()
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    names = [*reversed(parameters), "input"]
    with torch.enable_grad():
        with mode:
            y = network(x)
        wanted = [*reversed(parameters.values()), x]
        if not y.requires_grad:
            return y, dict.fromkeys(names)
        found = torch.autograd.grad(y, wanted, cotangent, allow_unused=True)
    return y.detach(), dict(zip(names, found, strict=True))


def gradients_and_terms(
    network: nn.Module, x: Tensor, cotangent: Tensor, decisions: Sequence[Tensor], forward: Terms
) -> tuple[dict[str, Tensor | None], dict[str, tuple[float, int]]]:
    """:func:`gradients` with imposed decisions, and for each what :func:`compare` calls terms and summands.

    A parameter's gradient is a sum over pixels. Where its terms cancel (behind a norm that uses the
    batch's statistics that of a bias is 0), the result's size says nothing of its rounding errors.
    ``forward`` is what :func:`terms_of_layers` found.
    """
    calls: list[tuple[str, Any, Tensor, list[Tensor]]] = []
    handles = []
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) or (_is_norm(module) and module.weight is not None):

            def keep(module: Any, inputs: Any, output: Tensor, name: str = name) -> None:
                caught: list[Tensor] = []
                if not inputs or not output.requires_grad:
                    return
                output.register_hook(caught.append)
                calls.append((name, module, inputs[0].detach(), caught))

            handles.append(module.register_forward_hook(keep))
    _, found = gradients(network, x, cotangent, Replay(decisions))
    for handle in handles:
        handle.remove()
    terms: dict[str, tuple[float, int]] = {}
    smallest, backward_lost = forward.smallest, 1.0
    has_norm = any(_is_norm(module) for module in network.modules())
    arriving = 0.0  # what the layer behind sends, before anything cancels on the way
    for name, module, inputs, caught in reversed(calls):
        if not caught:
            continue
        gradient = caught[0]
        largest = gradient.abs().max().item()
        backward_lost = max(1.0, backward_lost * arriving / largest if largest else backward_lost)
        # Of the two factors of a term, the worse known; behind a norm, errors of all maps are in the gradient too.
        scale = max(forward.most_lost if has_norm else forward.lost.get(name, 1.0), backward_lost)
        squares = {key: (p.detach() ** 2).requires_grad_() for key, p in module.named_parameters(recurse=False)}
        squared = _terms_of_norm(module, inputs) if _is_norm(module) else inputs**2
        squared = squared.clamp(min=smallest**2).requires_grad_()
        # Linear in each of its factors, so with squared factors it gives the sums of squared terms.
        y = (
            squared * squares["weight"][:, None, None] + squares["bias"][:, None, None]
            if _is_norm(module)
            else torch.func.functional_call(module, squares, squared)
        )
        sums = torch.autograd.grad(y, [squared, *squares.values()], (gradient**2).clamp(min=smallest**2))
        if _is_norm(module):
            sums = (sums[0] / (_mean_and_variance(module, inputs)[1] + module.eps), *sums[1:])
        roots = [s.max().sqrt().item() for s in sums]
        pixels = gradient.numel() // gradient.shape[1]
        terms |= {f"{name}.{key}": (scale * root, pixels) for key, root in zip(squares, roots[1:], strict=True)}
        if inputs.shape == x.shape:
            terms["input"] = scale * roots[0], 1
        arriving = roots[0]
    return found, terms


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d))


def _terms_of_norm(norm: Any, x: Tensor) -> Tensor:
    """The squares of what a norm subtracts: x / sigma and mean / sigma."""
    mean, variance = _mean_and_variance(norm, x)
    return (x**2 + mean**2) / (variance + norm.eps)


def _mean_and_variance(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a batch or instance norm goes by, of shape (1 or N, C, 1, 1)."""
    if isinstance(norm, nn.BatchNorm2d) and not norm.training and norm.running_var is not None:
        return norm.running_mean[None, :, None, None], norm.running_var[None, :, None, None]  # type: ignore[index]
    dims = (2, 3) if isinstance(norm, nn.InstanceNorm2d) else (0, 2, 3)
    return x.mean(dims, keepdim=True), x.var(dims, unbiased=False, keepdim=True)
