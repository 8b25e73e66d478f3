"""Check a fast model against its reference: output, every layer, gradients, classes, repeatability."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch, ops
from ..model import FastUNet
from .recording import OtherDecisions, Recorder, gradients, gradients_and_terms, run_with_layers, terms_of_layers
from .report import Check, Comparison, Errors, Report, Segmentation
from .rule import Parity, compare

Rule = Callable[..., Parity]
Tensors = dict[str, Tensor]
_LOGITS, _INPUT = "logits", "input"

# Backward has as many stages as forward, and both factors of a gradient's terms carry errors: twice the
# stages, and twice the floor. Once the floor, 2 of some 600 runs of one small float16 network broke it, in
# biases of few elements that are within it twice.
_GRADIENT_STAGES = 2 * 2**2


def verify(
    model: nn.Module,
    reference: nn.Module,
    inputs: Tensor,
    *,
    dtype: torch.dtype | None = None,
    gradients: bool = True,
    deterministic: bool = True,
    rule: Rule = compare,
) -> Report:
    """Check that ``model`` computes what ``reference`` does, as accurately.

    Neither is changed: copies are cast and run, in the train or eval mode in which they come.

    Args:
        model: the candidate, usually a :class:`fastunet.FastUNet`; of it, and of a reference with
            the same parameter names, every layer and every parameter's gradient is compared; of
            any other, the output and the gradient of the input.
        reference: any module of the same function, on the same device.
        inputs: (N, C, H, W), finite, on that device; cast to the working dtype, whose rounded
            values all three networks see.
        dtype: working dtype; by default that of the model's parameters.
        gradients: compare those of ``sum(logits * v)``, v being random numbers of variance 1, for
            the parameters that require one and the input. Their truth takes the sides of ReLUs and
            max-pools that the network took (see :mod:`fastunet.parity.recording`).
        deterministic: repeat the candidate, and once more after its weights were changed in place:
            bitwise the same, with every element written, on another stream, and of our kernels at
            another place of the batch (both on CUDA: a CPU's matrix products, in torch as in the
            interpreter, do not promise that).
        rule: decides on each tensor; takes what :func:`fastunet.parity.compare` takes.

    Raises:
        ValueError: inputs that are not four-dimensional or finite; a reference of other weights, or
            lacking some; outputs of another shape; for gradients, ReLUs or max-pools in another
            order than the model's.
    """
    if inputs.ndim != 4 or not inputs.is_floating_point():
        raise ValueError(f"inputs: expected floating (N, C, H, W), got {inputs.dtype} {tuple(inputs.shape)}")
    if not inputs.isfinite().all():
        raise ValueError("inputs: expected finite values, found NaN or infinity")
    if isinstance(reference, FastUNet):
        raise ValueError("reference: expected plain PyTorch, got a FastUNet, which would share its mistakes")
    _check_weights(model, reference)
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters()), inputs.dtype)
    x = inputs.detach().to(dtype)
    if not x.isfinite().all():
        raise ValueError(f"inputs: expected values within the range of {dtype}, found larger ones")
    candidate = copy.deepcopy(model).to(dtype)
    # Rounded to the working dtype first, so that all three have the very same weights.
    baseline = copy.deepcopy(reference).to(dtype)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in baseline.named_parameters():
        parameter.requires_grad_(wanted.get(name, parameter.requires_grad))
    truth = copy.deepcopy(baseline).double()
    implementation = dispatch.choose(x.device, dtype).implementation if isinstance(model, FastUNet) else "module"
    tf32 = x.is_cuda and dtype == torch.float32 and ops.tf32()

    ours = _forward(candidate, x)
    theirs, exact = _forward(baseline, x), _forward(truth, x.double())
    with torch.no_grad():
        terms, lost = terms_of_layers(truth, x.double(), torch.finfo(dtype).smallest_normal)
    terms[_LOGITS] = next(reversed(terms.values()), 0.0)  # the head's
    depth = max(1, len(ours) - 1)
    y, logits = ours[_LOGITS], exact[_LOGITS]
    if y.shape != logits.shape:
        raise ValueError(f"outputs: expected one shape, got {tuple(y.shape)} and the reference's {tuple(logits.shape)}")

    comparisons: list[Comparison] = []
    for stage, name in enumerate(ours, 1):
        if name in exact:
            parity = rule(
                ours[name], theirs[name], exact[name], tf32=tf32, stages=min(stage, depth), terms=terms.get(name, 0.0)
            )
            errors = distance(ours[name], exact[name]), distance(theirs[name], exact[name])
            kind = "output" if name == _LOGITS else "layer"
            comparisons.append(Comparison(kind, name, implementation, parity, *errors))
    checks: list[Check] = []
    if deterministic:
        checks += _repeat("", ours, lambda: _forward(candidate, x))
        if implementation == "triton" and x.is_cuda and len(x) > 1:
            again = {name: t.roll(-1, 0) for name, t in _forward(candidate, x.roll(1, 0)).items()}
            checks.append(_same("another batch position", ours, again))
    if gradients:
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        sides = Recorder()
        again, found = _gradients(candidate, x, cotangent, sides)
        # With gradients wanted the forward pass is other code: nothing folded, nothing prepared.
        parity = rule(again, theirs[_LOGITS], logits, tf32=tf32, stages=depth, terms=terms[_LOGITS])
        errors = distance(again, logits), distance(theirs[_LOGITS], logits)
        comparisons.append(Comparison("output", "logits with gradients", implementation, parity, *errors))
        comparisons += _compare_gradients(
            found, sides.decisions, baseline, truth, x, cotangent, depth, lost, tf32, rule
        )
        if deterministic:
            kept = {name: g for name, g in found.items() if g is not None}
            run = lambda: {k: g for k, g in _gradients(candidate, x, cotangent, Recorder())[1].items() if g is not None}
            checks += _repeat("gradients, ", kept, run)
    finite = int((~y.isfinite()).sum())
    checks.append(Check("finite output", not finite, f"{finite} of {y.numel()} are not" if finite else "all"))
    if deterministic and isinstance(model, FastUNet) and not any(module.training for module in model.modules()):
        checks += _fresh(model, candidate, x, y)
    return Report(
        str(x.device),
        str(dtype).removeprefix("torch."),
        tuple(x.shape),
        tuple(comparisons),
        tuple(checks),
        tuple(_not_compared(ours, exact, x, gradients, deterministic)),
        _versions(x),
        _segmentation(y, logits),
        _segmentation(theirs[_LOGITS], logits),
        _error_map(y, logits),
        _error_map(theirs[_LOGITS], logits),
    )


def _not_compared(ours: Tensors, exact: Tensors, x: Tensor, gradients: bool, deterministic: bool) -> Iterator[str]:
    if not ours.keys() & exact.keys() - {_LOGITS}:
        why = "the model ran without fused operators" if len(ours) == 1 else "the reference names its layers otherwise"
        yield f"layers ({why})"
    if not gradients:
        yield "gradients (not asked for)"
    if not deterministic:
        yield "repeatability (not asked for)"
    elif not x.is_cuda:
        yield "other streams and places in the batch (a CPU)"
    elif len(x) == 1:
        yield "places in the batch (there is one image)"


def _versions(x: Tensor) -> str:
    triton = importlib.metadata.version("triton") if dispatch.has_triton() else "none"
    where = torch.cuda.get_device_name(x.device) if x.is_cuda else f"{torch.get_num_threads()} threads"
    return f"PyTorch {torch.__version__}, Triton {triton}, {where}"


def _check_weights(model: nn.Module, reference: nn.Module) -> None:
    """Of the same names: the same tensors. A reference that names its own way is taken as it is."""
    ours, theirs = model.state_dict(), reference.state_dict()
    if not ours.keys() & theirs.keys():
        return
    for here, there, who, whose in ((ours, theirs, "reference", "model"), (theirs, ours, "model", "reference")):
        missing = next((name for name in here if name not in there), None)
        if missing is not None:
            raise ValueError(f"{who}: expected the {whose}'s parameters, lacks {missing!r}")
    for name, tensor in ours.items():
        if tensor.shape != theirs[name].shape:
            shapes = f"{tuple(tensor.shape)}, got {tuple(theirs[name].shape)}"
            raise ValueError(f"reference: expected {name!r} of shape {shapes}")
        if not torch.equal(tensor.double().cpu(), theirs[name].double().cpu()):
            raise ValueError(f"reference: expected the model's weights, {name!r} holds other values")


@torch.no_grad()
def _forward(network: nn.Module, x: Tensor) -> Tensors:
    """Every layer by its name, and the logits last."""
    y, layers = run_with_layers(network, x)
    if not isinstance(y, Tensor) or y.ndim != 4:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"outputs: expected a tensor (N, C, H, W) of {type(network).__name__}, got {got}")
    return {**layers, _LOGITS: y}


_gradients = gradients  # verify's argument has the same name


def _compare_gradients(
    ours: dict[str, Tensor | None],
    decisions: list[Tensor],
    baseline: nn.Module,
    truth: nn.Module,
    x: Tensor,
    cotangent: Tensor,
    depth: int,
    lost: float,
    tf32: bool,
    rule: Rule,
) -> list[Comparison]:
    their_sides = Recorder()
    _, theirs = gradients(baseline, x, cotangent, their_sides)
    wide, smallest = (x.double(), cotangent.double()), torch.finfo(x.dtype).smallest_normal
    try:
        exact, terms = gradients_and_terms(truth, *wide, decisions, smallest, lost)
        their_exact, _ = gradients_and_terms(truth, *wide, their_sides.decisions, smallest, lost)
    except OtherDecisions as error:
        raise ValueError(f"gradients: cannot be compared, {error}; gradients=False leaves them out") from None
    comparisons = []
    for name, truth_of_it in exact.items():
        base, base_truth = theirs[name], their_exact[name]
        if name not in ours or truth_of_it is None or base is None or base_truth is None:
            continue  # a parameter of the reference's own, or one that the output does not depend on
        found = ours[name]
        size, summands = terms.get(name, (0.0, 1))
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
                stages=_GRADIENT_STAGES * depth,
                terms=size,
                summands=summands,
            )
        errors = distance(found, truth_of_it), distance(base, base_truth)
        # The operators' backward passes are torch's own.
        comparisons.append(Comparison("gradient", name, "torch", parity, *errors))
    return comparisons


def distance(result: Tensor, truth: Tensor) -> Errors:
    """Errors of a result, over the elements that are finite in both."""
    off = result.double() - truth
    finite = truth.isfinite() & off.isfinite()
    off, truth = off[finite].abs(), truth[finite]
    if not finite.any():
        return Errors(0.0, 0.0, 0.0)
    size = truth.norm().item()
    return Errors(off.max().item(), off.mean().item(), off.norm().item() / size if size else off.norm().item())


def _error_map(logits: Tensor, truth: Tensor) -> Tensor:
    return (logits.double() - truth).abs().amax(1).float().cpu()


def _segmentation(logits: Tensor, truth: Tensor) -> Segmentation:
    def classes(t: Tensor) -> Tensor:
        return (t[:, 0] > 0).long() if t.shape[1] == 1 else t.argmax(1)

    found, expected = classes(logits), classes(truth)
    flipped = found != expected
    if truth.shape[1] == 1:
        margin = truth[:, 0].abs()
    else:
        top = truth.topk(2, dim=1).values
        margin = top[:, 0] - top[:, 1]
    both, either = ((found > 0) & (expected > 0)).sum().item(), ((found > 0) | (expected > 0)).sum().item()
    flips = int(flipped.sum())
    return Segmentation(
        flips,
        flipped.numel(),
        2 * both / (both + either) if either else 1.0,
        both / either if either else 1.0,
        margin[flipped].max().item() if flips else 0.0,
    )


# --- repeatability ---------------------------------------------------------------------------


def _same(name: str, first: Tensors, again: Tensors) -> Check:
    """Bitwise equality of all tensors; NaN counts as equal to itself."""
    for key, y in first.items():
        differ = int(((again[key] != y) & ~(again[key].isnan() & y.isnan())).sum())
        if differ:
            return Check(name, False, f"{differ} elements of {key} differ")
    return Check(name, True, "bitwise equal")


def _repeat(prefix: str, first: Tensors, run: Callable[[], Tensors]) -> Iterator[Check]:
    """Runs of the candidate that must give bitwise what the first gave."""
    yield _same(f"{prefix}second run", first, run())
    with _poisoned_memory():
        poisoned = run()
    unwritten = {name: int((t.isnan() & ~first[name].isnan()).sum()) for name, t in poisoned.items()}
    detail = next((f"{n} elements of {name} kept the NaN put there" for name, n in unwritten.items() if n), "")
    yield Check(f"{prefix}every element written", not detail, detail or "memory was filled with NaN before")
    device = next(iter(first.values())).device
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            again = run()
        torch.cuda.current_stream(device).wait_stream(stream)
        yield _same(f"{prefix}another stream", first, again)


@torch.no_grad()
def _fresh(model: FastUNet, candidate: nn.Module, x: Tensor, y: Tensor) -> Iterator[Check]:
    """Prepared weights are those of now: in the model as it came, and after a change in place."""
    if next(model.parameters()).dtype == x.dtype:
        yield _same("the model itself, not a copy", {_LOGITS: y}, {_LOGITS: model(x)})
    for tensor in candidate.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(1.25)
    changed, fresh = candidate(x), copy.deepcopy(candidate)(x)
    yield _same("after weights changed in place", {_LOGITS: fresh}, {_LOGITS: changed})


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN."""
    settings: Any = torch.utils.deterministic
    fill, enabled = settings.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)  # or nothing is filled
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
