"""Check a fast model against its reference: output, every layer, gradients, classes, repeatability."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from .. import dispatch, ops
from ..built import as_built
from ..config import UNetConfig
from ..model import FastUNet
from ..reference import UNet
from .alone import alone
from .gradients import backward_runs_on, compare_gradients, repeats
from .measures import distance, error_map, segmentation
from .recording import Recorder, Run, logits_in_one_pass, run_with_layers
from .recording import gradients as gradients_of
from .repeatability import Tensors, fresh, repeat, same
from .report import Alone, Check, Comparison, Report
from .rule import Rule, compare, truncating_stages
from .terms import terms_of_layers

_LOGITS = "logits"


def verify(
    model: nn.Module,
    reference: nn.Module,
    inputs: Tensor,
    *,
    dtype: torch.dtype | None = None,
    gradients: bool = True,
    deterministic: bool = True,
    rule: Rule = compare,
    on_result: Callable[[Comparison | Check], None] = lambda result: None,
) -> Report:
    """Check that ``model`` computes what ``reference`` does, as accurately.

    Neither is changed: copies are cast and run, in the train or eval mode in which they come.

    Args:
        model: the candidate, usually a :class:`fastunet.FastUNet`; of it, and of a reference with
            the same parameter names, every layer and every parameter's gradient is compared, each
            layer's operator by itself too, on the candidate's own map and weights; of any other,
            the output and the gradient of the input.
        reference: any module of the same function, on the same device.
        inputs: (N, C, H, W), finite, on that device; cast to the working dtype, whose rounded
            values all three networks see.
        dtype: working dtype, float16, bfloat16 or float32; by default that of the model's parameters.
        gradients: compare those of ``sum(logits * v)``, v being random numbers of variance 1, for
            the parameters that require one and the input. Their truth takes the sides of ReLUs and
            max-pools that the network took (see :mod:`fastunet.parity.recording`).
        deterministic: repeat the candidate, and once more after its weights were changed in place:
            bitwise the same, with every element written, on another stream, and of our kernels at
            another place of the batch (both on CUDA: a CPU's matrix products, in torch as in the
            interpreter, do not promise that).
        rule: decides on each tensor, and on each layer by itself; takes what
            :func:`fastunet.parity.compare` takes.
        on_result: called with each result as it is found, for who wants to see the run go on.

    Raises:
        ValueError: inputs that are not four-dimensional or finite; another ``dtype`` than these; weights that are not
            finite; a reference of other ones, lacking some, or in another mode; outputs of another shape; for
            gradients, ReLUs or max-pools in another order than the model's.
    """
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not inputs.is_floating_point():
        got = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"inputs: expected floating (N, C, H, W), got {got}")
    if not inputs.isfinite().all():
        raise ValueError("inputs: expected finite values, found NaN or infinity")
    if any(isinstance(module, FastUNet) for module in reference.modules()):
        raise ValueError("reference: expected plain PyTorch, got a FastUNet, which would share its mistakes")
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters()), inputs.dtype)
    if dtype not in dispatch.TRITON_DTYPES:
        expected = "float16, bfloat16 or float32, of which float64 is the truth"
        raise ValueError(f"dtype: expected {expected}, got {str(dtype).removeprefix('torch.')}")
    if _norm_modes(model) != _norm_modes(reference) and _norm_modes(model) and _norm_modes(reference):
        raise ValueError("reference: expected its batch norms in the train or eval mode of the model's, got the other")
    _check_weights(model, reference, dtype)
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
    tf32 = x.is_cuda and dtype == torch.float32 and ops.tf32()

    config = model.config if isinstance(model, UNet) else None
    run = _run(candidate, x, config)
    ours, steps = {**run.layers, _LOGITS: run.output}, run.steps
    theirs, exact = _forward(baseline, x, config), _forward(truth, x.double(), config)
    with torch.no_grad():
        terms = terms_of_layers(_as_ours(truth, config), x.double(), torch.finfo(dtype).smallest_normal)
    threshold = 0.0 if config is None else config.threshold
    # A sigmoid, where it is steepest, passes on a quarter of an error.
    terms.of_layers[_LOGITS] = (0.25 if threshold else 1.0) * terms.of_layers.get("head", 0.0)
    used = {step.implementation for step in steps.values()}
    overall = "module" if not isinstance(model, FastUNet) else "+".join(sorted(used)) or "reference"
    interpreted = "triton" in used and not x.is_cuda
    depth = max(1, sum(name != _LOGITS and not name.endswith(".pool") for name in ours))
    is_training = any(module.training for module in model.modules())
    y, logits = ours[_LOGITS], exact[_LOGITS]
    for name in (_LOGITS, *ours):
        if name in exact and ours[name].shape != exact[name].shape:
            what, shapes = "outputs" if name == _LOGITS else f"layer {name!r}", (ours[name].shape, exact[name].shape)
            raise ValueError("{}: expected one shape, got {} and the reference's {}".format(what, *map(tuple, shapes)))

    results: list[Comparison | Check] = []

    def keep(found: Iterable[Comparison | Check]) -> None:
        for result in found:
            results.append(result)
            on_result(result)

    def comparison(kind: str, name: str, mine: Tensor, stages: int, implementation: str) -> Comparison:
        parity = rule(
            mine,
            theirs[name],
            exact[name],
            tf32=tf32,
            stages=truncating_stages(stages, dtype, interpreted),
            terms=terms.of_layers.get(name, 0.0),
        )
        errors = distance(mine, exact[name]), distance(theirs[name], exact[name])
        return Comparison(kind, name, implementation, parity, *errors)

    alone_rule = partial(rule, tf32=tf32, stages=truncating_stages(1, dtype, interpreted))
    by_itself: Iterator[Alone] = iter(())
    stage, implementation = 0, overall
    for name in ours:
        stage = min(stage + (not name.endswith(".pool")), depth)  # the pool comes with its layer
        if name in steps:
            implementation = steps[name].implementation
            by_itself = alone(steps[name], alone_rule, torch.finfo(dtype).smallest_normal)
        if name == _LOGITS:
            keep([comparison("output", name, ours[name], stage, overall)])
        elif name in exact and name in theirs:
            found = comparison("layer", name, ours[name], stage, implementation)
            keep([dataclasses.replace(found, alone=next(by_itself, None))])
    asked = {"gradients": gradients, "deterministic": deterministic}
    skipped = list(_not_compared(model, ours, exact, x, **asked, training=is_training, kernels="triton" in used))
    if isinstance(candidate, FastUNet):  # nobody looks on as a rule, so that other code may run
        unwatched = logits_in_one_pass(candidate, run)
        if unwatched is not None:
            in_one_pass = comparison("output", _LOGITS, unwatched, depth, overall)
            keep([dataclasses.replace(in_one_pass, name="logits, with the head in one pass")])
        if not interpreted:  # where the same kernels would run, at a second each
            with torch.no_grad():
                called, on_torch = candidate(x), candidate.runs_on_plain_torch(x)
            if on_torch and steps:
                as_called = comparison("output", _LOGITS, called, depth, "reference")
                keep([dataclasses.replace(as_called, name="logits, as it is called, unwatched")])
            else:
                expected = {_LOGITS: run.output if unwatched is None else unwatched}
                keep([same("as it is called, unwatched", expected, {_LOGITS: called})])
        if deterministic and unwatched is not None:
            steady = not x.is_cuda or "torch" not in used
            again = partial(_logits_again, candidate, run)
            keep(repeat("in one pass, ", {_LOGITS: unwatched}, again, x, steady=steady))
    if deterministic:
        steady = not x.is_cuda or (bool(used) and "torch" not in used)
        keep(repeat("", ours, lambda x: _forward(candidate, x, config), x, steady=steady))
        if "triton" in used and x.is_cuda and len(x) > 1 and not is_training:
            again = {name: t.roll(-1, 0) for name, t in _forward(candidate, x.roll(1, 0), config).items()}
            keep([same("another batch position", ours, again)])
    if gradients:
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        sides = Recorder()
        again, found = gradients_of(candidate, x, cotangent, sides)
        ran_on = backward_runs_on(candidate, x)
        # With gradients wanted the forward pass is other code: nothing folded, nothing prepared.
        is_reference = isinstance(model, FastUNet) and not sides.steps
        with_gradients = comparison("output", _LOGITS, again, depth, "reference" if is_reference else overall)
        keep([dataclasses.replace(with_gradients, name="logits with gradients")])
        keep(
            dataclasses.replace(gradient, implementation="reference") if is_reference else gradient
            for gradient in compare_gradients(
                found, sides.decisions, ran_on, baseline, truth, x, cotangent, depth, terms, tf32, rule
            )
        )
        if is_reference:
            skipped.append("gradients of code of our own (such a network trains as the reference itself on a CPU)")
        elif isinstance(model, FastUNet) and "triton" not in used and not x.is_cuda:
            skipped.append(
                "what trains on a CPU, which is the reference itself (compared are the operators' gradients)"
            )
        if deterministic:
            kept = {name: g for name, g in found.items() if g is not None}

            def gradients_again(x: Tensor) -> Tensors:
                again = gradients_of(candidate, x, cotangent, Recorder())[1]
                return {name: g for name, g in again.items() if g is not None}

            steady = {*ran_on.values()} == {"triton"}
            promised = isinstance(model, FastUNet) and type(model).forward is FastUNet.forward and as_built(model)
            if x.is_cuda and not promised and not repeats(baseline, x, cotangent):
                skipped.append("repeatability of gradients (PyTorch's layers do not repeat here)")
            else:
                keep(repeat("gradients, ", kept, gradients_again, x, steady=steady or not x.is_cuda))
    lacking = int((~y.isfinite()).sum())
    keep([Check("finite output", not lacking, f"{lacking} of {y.numel()} are not" if lacking else "all")])
    if deterministic and isinstance(model, FastUNet) and isinstance(candidate, FastUNet) and not is_training:
        keep(fresh(model, candidate, x))
    return Report(
        str(x.device),
        str(dtype).removeprefix("torch.") + (", convolutions in tf32" if tf32 else ""),
        tuple(x.shape),
        tuple(r for r in results if isinstance(r, Comparison)),
        tuple(r for r in results if isinstance(r, Check)),
        tuple(skipped),
        (f"{_described(model)} against {type(reference).__name__}",),
        _versions(x),
        segmentation(y, logits, threshold),
        segmentation(theirs[_LOGITS], logits, threshold),
        error_map(y, logits),
        error_map(theirs[_LOGITS], logits),
    )


def _logits_again(candidate: FastUNet, run: Run, _: Tensor) -> Tensors:
    logits = logits_in_one_pass(candidate, run)
    return {} if logits is None else {_LOGITS: logits}


def _norm_modes(network: nn.Module) -> set[bool]:
    return {module.training for module in network.modules() if isinstance(module, nn.BatchNorm2d)}


def _as_ours(reference: nn.Module, config: UNetConfig | None) -> nn.Module:
    """The reference, or a network of ours with its weights, where it is another that has our names for them."""
    if isinstance(reference, UNet) or config is None:
        return reference
    with torch.device("meta"):
        network = UNet.from_config(config)
    if network.state_dict().keys() != reference.state_dict().keys():
        return reference
    network.load_state_dict(reference.state_dict(), assign=True)
    return network.train(reference.training)


def _described(model: nn.Module) -> str:
    """A network of ours with what is not the default."""
    if not isinstance(model, UNet):
        return type(model).__name__
    changed = (f"{name}={value!r}" for name, value in model.config.changes().items())
    return f"{type(model).__name__}({', '.join(changed)})"


def _not_compared(
    model: nn.Module,
    ours: Tensors,
    exact: Tensors,
    x: Tensor,
    *,
    gradients: bool,
    deterministic: bool,
    training: bool,
    kernels: bool,
) -> Iterator[str]:
    missing = [name for name in ours if name not in exact]
    if not isinstance(model, FastUNet):
        yield f"whether prepared weights are those of now (a {type(model).__name__}, expected a FastUNet itself)"
    if not isinstance(model, UNet):
        yield f"layers (a {type(model).__name__} does not say which it has)"
    elif len(ours) == 1:
        yield "layers (the model ran without fused operators)"
    elif len(missing) == len(ours) - 1:
        yield "layers (the reference has no modules of their names)"
    elif missing:
        yield f"layers {', '.join(missing)} (the reference has no modules of these names)"
    if not gradients:
        yield "gradients (not asked for)"
    if not deterministic:
        yield "repeatability (not asked for)"
    elif not x.is_cuda:
        yield "other streams and places in the batch (a CPU)"
    elif len(x) == 1:
        yield "places in the batch (there is one image)"
    elif not kernels:
        yield "places in the batch (PyTorch's operators do not promise that)"
    elif training:
        yield "places in the batch (its statistics are of all of it)"
    if deterministic and training and isinstance(model, FastUNet):
        yield "whether prepared weights are those of now (in train mode)"


def _versions(x: Tensor) -> str:
    triton = importlib.metadata.version("triton") if dispatch.has_triton() else "none"
    where = torch.cuda.get_device_name(x.device) if x.is_cuda else f"{torch.get_num_threads()} threads"
    return f"PyTorch {torch.__version__}, Triton {triton}, {where}"


def _check_weights(model: nn.Module, reference: nn.Module, dtype: torch.dtype) -> None:
    """Of the same names: the same tensors in the working dtype. One that names its own way is taken as it is."""
    ours, theirs = model.state_dict(), reference.state_dict()
    if 2 * len(ours.keys() & theirs.keys()) < len(ours):
        theirs = {}
    for who, tensors in (("model", ours), ("reference", theirs)):
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.to(dtype).isfinite().all():
                raise ValueError(f"{who}: expected finite weights in {dtype}, {name!r} holds others")
    if not theirs:
        return
    for here, there, who, whose in ((ours, theirs, "reference", "model"), (theirs, ours, "model", "reference")):
        missing = next((name for name in here if name not in there), None)
        if missing is not None:
            raise ValueError(f"{who}: expected the {whose}'s parameters, lacks {missing!r}")
    for name, tensor in ours.items():
        if tensor.shape != theirs[name].shape:
            shapes = f"{tuple(tensor.shape)}, got {tuple(theirs[name].shape)}"
            raise ValueError(f"reference: expected {name!r} of shape {shapes}")
        if not torch.equal(tensor.to(dtype).cpu(), theirs[name].to(dtype).cpu()):
            raise ValueError(f"reference: expected the model's weights, {name!r} holds other values")


@torch.no_grad()
def _run(network: nn.Module, x: Tensor, config: UNetConfig | None) -> Run:
    run = run_with_layers(network, x, config)
    y = run.output
    if not isinstance(y, Tensor) or y.ndim != 4:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"outputs: expected a tensor (N, C, H, W) of {type(network).__name__}, got {got}")
    return run


def _forward(network: nn.Module, x: Tensor, config: UNetConfig | None) -> Tensors:
    """Every layer by its name, and the logits last."""
    run = _run(network, x, config)
    return {**run.layers, _LOGITS: run.output}
