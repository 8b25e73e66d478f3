"""Gradients of a model against its reference's: each parameter's, and the input's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .. import dispatch, ops
from ..built import as_built
from ..model import FastUNet
from ..trace import trace
from .measures import distance
from .recording import OtherDecisions, Recorder, Replay, gradients
from .repeatability import same
from .report import Comparison
from .rule import Parity, Rule, truncating_stages
from .terms import Terms, gradients_and_terms

# Backward has as many stages as forward, and both factors of a gradient's terms carry errors: twice the
# stages, and twice the floor. Once the floor, 2 of some 600 runs of one small float16 network broke it, in
# biases of few elements that are within it twice.
_STAGES = 2 * 2**2

_NORMS = nn.BatchNorm2d, nn.InstanceNorm2d


def backward_runs_on(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Which implementation gives each gradient of a model."""
    names = [name for name, _ in model.named_parameters()]
    if not isinstance(model, FastUNet) or not as_built(model):
        return dict.fromkeys([*names, "input"], "torch" if isinstance(model, FastUNet) else "module")
    layers = trace(model.config, *x.shape[-2:], batch=len(x))
    steps = "dgrad", "wgrad"
    passes = {step: dispatch.choose(x.device, x.dtype, step).implementation for step in steps}
    chosen, act_first = {}, model.config.order == "conv_act_norm"
    for layer in layers:
        of = layer.op, layer.in_shapes, layer.weight_shape, x.device, x.dtype, layer.mode
        chosen[layer.name] = [ops.choose(*of, step, layer.geometry).implementation for step in steps]
    behind_activations = {layer.name for layer in layers if layer.activation and (layer.norm is None or act_first)}

    def of_parameter(name: str) -> str:
        path, _, kind = name.rpartition(".")
        if isinstance(model.get_submodule(path), _NORMS):
            return passes["dgrad"]
        if kind == "bias" and path in behind_activations and "triton" in passes.values():
            return "triton"  # it comes of the pass through the activation
        return chosen[path][1] if path in chosen else "torch"  # a parametrization's, or a subclass's own

    return {**{name: of_parameter(name) for name in names}, "input": chosen[layers[0].name][0]}


def repeats(network: nn.Module, x: Tensor, cotangent: Tensor) -> bool:
    """Whether the gradients of a network are the same twice, to the bit."""
    first, again = (gradients(network, x, cotangent, Recorder())[1] for _ in range(2))
    kept = {name: g for name, g in first.items() if g is not None}
    return same("", kept, {name: again[name] for name in kept}).ok  # pyright: ignore[reportArgumentType]


def _alike(decisions: list[Tensor], others: list[Tensor]) -> bool:
    pairs = zip(decisions, others, strict=False)
    return len(decisions) == len(others) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def compare_gradients(
    ours: dict[str, Tensor | None],
    decisions: list[Tensor],
    ran_on: dict[str, str],
    baseline: nn.Module,
    truth: nn.Module,
    x: Tensor,
    cotangent: Tensor,
    depth: int,
    forward: Terms,
    tf32: bool,
    rule: Rule,
) -> Iterator[Comparison]:
    """Each gradient of ``ours``, made with these decisions, by the rule.

    Args:
        ran_on: which implementation gave each.
        forward: terms of the forward pass; depth: how many layers it has.

    Raises:
        ValueError: the networks' ReLUs or max-pools come in another order.
    """
    their_sides = Recorder()
    _, theirs = gradients(baseline, x, cotangent, their_sides)
    wide = x.double(), cotangent.double()
    try:
        exact, terms = gradients_and_terms(truth, *wide, decisions, forward)
        their_exact = exact
        if not _alike(decisions, their_sides.decisions):
            their_exact = gradients(truth, *wide, Replay(their_sides.decisions))[1]
    except OtherDecisions as error:
        raise ValueError(f"gradients: cannot be compared, {error}; gradients=False leaves them out") from None
    for name, truth_of_it in exact.items():
        base, base_truth = theirs[name], their_exact[name]
        if name not in ours or truth_of_it is None or base is None or base_truth is None:
            continue  # a parameter of the reference's own, or one that the output does not depend on
        found = ours[name]
        size, summands = terms.get(name, (0.0, 1))
        implementation = ran_on[name]
        if found is None:
            parity = Parity(False, float("inf"), 0.0, 0.0, "the candidate has no gradient")
            found = torch.full_like(base, torch.nan)
        else:
            parity = rule(
                found,
                base,
                truth_of_it,
                baseline_truth=base_truth,
                tf32=tf32,
                stages=truncating_stages(_STAGES * depth, x.dtype, implementation == "triton" and not x.is_cuda),
                terms=size,
                summands=summands,
            )
        errors = distance(found, truth_of_it), distance(base, base_truth)
        yield Comparison("gradient", name, implementation, parity, *errors)
