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

from .. import dispatch, ops
from ..config import UNetConfig
from ..model import FastUNet, joins_head
from ..ops.common import has_factors
from ..ops.upsampling import launched
from ..trace import Layer, trace

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_LEAKY_RELUS = {F.leaky_relu, F.leaky_relu_}
_IN_PLACE = {F.relu_, torch.relu_, Tensor.relu_, F.leaky_relu_}


class OtherDecisions(ValueError):
    """A network met another ReLU or max-pool than the one whose decisions it is to repeat."""


@dataclass(frozen=True)
class Step:
    """What a FastUNet did for one layer.

    Attributes:
        arguments: of the fused operator, by their names.
        result, pooled: what it gave.
        implementation: what computed it.
    """

    arguments: dict[str, Any]
    result: Tensor
    pooled: Tensor | None
    implementation: str


class Recorder(TorchFunctionMode):
    """Within the block, keeps the steps of a FastUNet's layers and the decisions of every operator.

    A decision is, of a ReLU, the elements that stay as they are, and of a max-pool the places of
    its maxima.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
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
        elif getattr(func, "namespace", None) == "fastunet":
            names = [argument.name for argument in func._schema.arguments]
            given = {name: t.detach() if isinstance(t, Tensor) else t for name, t in zip(names, args, strict=True)}
            found = tuple(t.detach() for t in (result if isinstance(result, tuple) else (result,)))
            self._keep(func.name().removeprefix("fastunet::"), given, found)
        return result

    def _keep(self, operator: str, given: dict[str, Any], found: tuple[Tensor, ...]) -> None:
        if operator.endswith("_moments"):  # the same convolution, without an activation
            operator = operator.replace("_moments", "_relu")
            given = {name: value for name, value in given.items() if name not in ("eps", "per_image")} | {"slope": 1.0}
            found = found[:1]
        y, pools = found[0], given.get("pool", operator == "conv2d_relu_pool")
        if given.get("slope", 1) != 1:  # a slope of 1 is no activation
            self.decisions.append(y > 0)
        if pools:
            self.decisions.append(_places(y, 2))
        if operator != "norm_relu":
            self.steps.append(Step(given, y, found[1] if pools else None, _implementation(operator, given)))


def _implementation(operator: str, given: dict[str, Any]) -> str:
    """What an operator of these arguments ran on."""
    x, weight, mode = given["x"], given["weight"], "none"
    maps: Any = (tuple(x.shape),)
    if "skip" in given:
        maps, mode = launched(x, given["skip"], given["mode"], given["match"])
    how: Any = {"geometry": dispatch.geometry(given.get("stride", (1, 1)), given.get("padding", "same"))}
    how["factors"] = has_factors(given["bias"])
    return ops.choose(operator, maps, tuple(weight.shape), x.device, x.dtype, mode, **how).implementation


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


@dataclass(frozen=True)
class Run:
    """A forward pass.

    Attributes:
        output: of the network.
        layers: the result of each fused operator by its layer's name, in order. A max-pool that
            came with a layer is there by its own name, ``"downs.0.pool"``.
        steps: of a FastUNet, by the layers' names.
    """

    output: Tensor
    layers: dict[str, Tensor]
    steps: dict[str, Step]


def run_with_layers(network: nn.Module, x: Tensor, config: UNetConfig | None) -> Run:
    """Run a network and keep what its layers gave.

    Args:
        config: of the U-Net that names the layers: a network of another class shows those of its
            modules that have such a name. None for a network without.
    """
    if config is None:
        return Run(network(x), {}, {})
    layers_of_it = trace(config, *x.shape[-2:], batch=len(x))
    names = [layer.name for layer in layers_of_it]
    pools = pools_after(config, names)
    if isinstance(network, FastUNet):
        with Recorder() as recorder:
            y = network(x)
        layers: dict[str, Tensor] = {}
        steps: dict[str, Step] = {}
        if recorder.steps:  # with instance norm a CPU runs the reference, without an operator
            steps = dict(zip(names, recorder.steps, strict=True))
        for name, step in steps.items():
            layers[name] = step.result
            if step.pooled is not None:
                layers[pools[name]] = step.pooled
        return Run(y, layers, steps)
    found: dict[str, Tensor] = {}
    handles = []
    for name, traced in zip(names, layers_of_it, strict=True):
        layer, norm = _module(network, name), norm_after(network, traced)
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
        apart = norm is not None and config.order == "conv_norm_act" and not is_folded(norm, config)
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
    return Run(y, found, {})


def _module(network: nn.Module, name: str) -> nn.Module | None:
    try:
        return network.get_submodule(name)
    except AttributeError:
        return None


def pools_after(config: UNetConfig, names: Sequence[str]) -> dict[str, str]:
    """The name of the max-pool behind each encoder level's last layer."""
    if config.downsample != "max_pool":
        return {}
    return {name: f"{level}.pool" for level, name in last_of_levels(names).items()}


def last_of_levels(names: Sequence[str]) -> dict[str, str]:
    """The last layer of each encoder level, by its name."""
    return {name.split(".conv.")[0]: name for name in names if name.startswith("downs.")}


def norm_after(network: nn.Module, layer: Layer) -> Any:
    """The norm behind a layer's convolution, or None."""
    return None if layer.norm is None else _module(network, layer.norm)


def is_folded(norm: Any, config: UNetConfig) -> bool:
    """Whether FastUNet's operator holds the norm and the activation behind it."""
    fixed = isinstance(norm, nn.BatchNorm2d) and not norm.training and norm.running_mean is not None
    return fixed and config.order == "conv_norm_act"


@torch.no_grad()
def logits_in_one_pass(network: FastUNet, run: Run) -> Tensor | None:
    """What the last layer and the head of a run give as one operator; None if they are two, looked at or not."""
    if not run.steps or joins_head(network) is None:
        return None
    conv, head = (step.arguments for step in list(run.steps.values())[-2:])
    x, weight, classes = conv["x"], conv["weight"], len(head["weight"])
    shapes = (tuple(x.shape),), tuple(weight.shape)
    how = {"classes": classes, "factors": has_factors(conv["bias"])}
    if ops.choose("conv2d_relu_head", *shapes, x.device, x.dtype, **how).implementation == "torch":
        return None
    given = x, weight, conv["bias"], head["weight"], head["bias"]
    relu = conv["slope"] != 1
    return network.finish(ops.conv2d_relu_head(*given, relu=relu, negative_slope=conv["slope"] if relu else 0.0))


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
