"""How large the terms of a network's sums are, where the sums themselves say nothing of their errors.

Where the terms of a sum cancel, its rounding errors are as large as the terms made them, not as the
result is. :func:`fastunet.parity.compare` takes that size as ``terms``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..reference import UNet, activate_
from ..trace import trace
from .recording import Replay, gradients, is_folded, last_of_levels, norm_after, pools_after

_SIGNS = 16  # draws


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
    lost, pools = 1.0, pools_after(config, names)
    last_of_level = set(last_of_levels(names).values())
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
        roots = term_roots(conv, (inputs**2).clamp(min=smallest**2) * losses**2)
        terms[name] = roots.max().item()
        norm = norm_after(network, layer)
        if norm is not None and config.order == "conv_act_norm":
            y = activate_(y, config.slope)
        if norm is not None and norm.weight is not None:
            roots = through_norm(roots, norm, y)
            y = norm(y)
            if is_folded(norm, config):
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


def term_roots(conv: nn.Module, squares: Tensor) -> Tensor:
    """(C,): the root of the sum of the squared terms, the largest of each channel, from squared inputs (N, C, H, W)."""
    factors = {key: p**2 for key, p in conv.named_parameters()}
    return torch.func.functional_call(conv, factors, squares).amax((0, 2, 3)).sqrt()


def through_norm(roots: Tensor, norm: Any, y: Tensor) -> Tensor:
    """:func:`term_roots` behind an affine norm of the map ``y``."""
    mean, variance = (t.flatten(1) for t in _mean_and_variance(norm, y))
    return ((roots**2 + mean**2) * norm.weight**2 / (variance + norm.eps) + norm.bias**2).amax(0).sqrt()


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
    output, found = gradients(network, x, cotangent, Replay(decisions))
    for handle in handles:
        handle.remove()
    terms: dict[str, tuple[float, int]] = {}
    smallest, least_lost = forward.smallest, _lost_in_sigmoid(network, output, cotangent, forward)
    has_norm = any(_is_norm(module) for module in network.modules())
    # What the layers behind send, before anything cancels on the way: the next one, and a level's decoder.
    arriving, backward_lost, through_skips = 0.0, least_lost, dict[str, float]()
    decoders = len({name.split(".")[1] for name, *_ in calls if name.startswith("ups.")})
    for name, module, inputs, caught in reversed(calls):
        if not caught:
            continue
        gradient = caught[0]
        largest = gradient.abs().max().item()
        level, _, place = name.partition(".conv.net.")
        arriving = math.hypot(arriving, through_skips.pop(level, 0.0))
        backward_lost = max(least_lost, arriving / largest if largest else backward_lost)
        # Of the two factors of a term, the worse known; behind a norm, errors of all maps are in the gradient too.
        scale = max(forward.most_lost if has_norm else forward.lost.get(name, 1.0), backward_lost)
        whole, module = module, _without_parametrizations(module)
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
        if whole is not module:
            made = torch.autograd.grad(module(inputs), list(module.parameters()), gradient)
            errors = {key: torch.maximum(s.sqrt(), g.abs()) for key, s, g in zip(squares, sums[1:], made, strict=True)}
            for key, root in _terms_of_parametrizations(whole, errors).items():
                terms[f"{name}.parametrizations.{key}"] = scale * root, pixels
        if inputs.shape == x.shape:
            terms["input"] = scale * roots[0], 1
        arriving = backward_lost * roots[0]
        if level.startswith("ups.") and place == "0":
            through_skips[f"downs.{decoders - 1 - int(level.removeprefix('ups.'))}"] = arriving
    return found, terms


def _without_parametrizations(module: Any) -> Any:
    """A copy with what they make as its parameters; the module itself where there are none."""
    if not parametrize.is_parametrized(module):
        return module
    plain: Any = copy.deepcopy(module).requires_grad_()  # or what they make would be no parameter
    plain.parametrizations.eval()  # in training some go on from a state of their own
    for key in list(plain.parametrizations):
        parametrize.remove_parametrizations(plain, key)
    return plain


def _terms_of_parametrizations(module: Any, errors: dict[str, Tensor]) -> dict[str, float]:
    """:func:`term_roots` of the gradients of what a module's weights are made of, by the ``errors`` of theirs.

    Each is linear in the weight's gradient; of errors of random signs the root mean square is what they add up to.
    """
    total: dict[str, float] = {}
    for key, made in copy.deepcopy(module.parametrizations).eval().requires_grad_().items():
        generator, error = torch.Generator(errors[key].device).manual_seed(0), errors[key]
        names, parameters = zip(*made.named_parameters(), strict=True)
        for _ in range(_SIGNS):
            signs = torch.randint(2, error.shape, generator=generator, device=error.device) * 2 - 1
            found = torch.autograd.grad(made(), parameters, signs * error, materialize_grads=True)
            for name, gradient in zip(names, found, strict=True):
                square = gradient.square().max().item() / _SIGNS
                total[f"{key}.{name}"] = total.get(f"{key}.{name}", 0.0) + square
    return {name: math.sqrt(square) for name, square in total.items()}


def _lost_in_sigmoid(network: nn.Module, y: Tensor, cotangent: Tensor, forward: Terms) -> float:
    """How many times larger the terms of the gradient of a final sigmoid were than it is; 1 without one.

    It is y (1 - y), which cancels where y is near 1, and is off by as large a part of it as the logits are off. All
    gradients before it share that error, so that it never averages out.
    """
    if not isinstance(network, UNet) or network.config.final_activation != "sigmoid":
        return 1.0
    largest = (cotangent * y * (1 - y)).abs().max().item() if y.numel() else 0.0
    if not largest:
        return 1.0
    return max(1.0, math.hypot((cotangent * y).abs().max().item() / largest, forward.of_layers.get("head", 0.0)))


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
