"""Check a fast model against its reference: output, every layer, classes, and repeatability.

Three networks with the same weights see the same inputs: the **truth** (the reference in float64),
the **baseline** (the reference in the working dtype: what its user has today) and the
**candidate** (the fast model in that dtype). The rule that decides is :func:`fastunet.parity.compare`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import dispatch
from .model import FastUNet
from .parity import Parity, compare
from .reference import UNet
from .trace import trace

Rule = Callable[..., Parity]


@dataclass(frozen=True)
class Errors:
    """Distance to the truth over the elements that are finite in it."""

    max: float
    mean: float
    relative_l2: float


@dataclass(frozen=True)
class Comparison:
    """One tensor: ``kind`` is ``"layer"`` or ``"output"``."""

    kind: str
    name: str
    implementation: str
    parity: Parity
    candidate: Errors
    baseline: Errors

    @property
    def ratio(self) -> float:
        """Error of the candidate over the baseline's; 1 where both are exact."""
        if self.parity.baseline_error == 0:
            return 1.0 if self.parity.candidate_error == 0 else float("inf")
        return self.parity.candidate_error / self.parity.baseline_error


@dataclass(frozen=True)
class Check:
    """A property that holds or not, and what was seen."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Segmentation:
    """Classes against the truth's: arg-max, or logit > 0 of a single channel.

    Attributes:
        flips: pixels of another class. pixels: of all.
        dice, iou: overlap of what is not class 0 with the truth's; 1 where both are empty.
        margin: the largest distance to the decision boundary, in logits of the truth, among the
            flipped pixels. A flip at a small margin is rounding; at a large one it is a mistake.
    """

    flips: int
    pixels: int
    dice: float
    iou: float
    margin: float


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found; ``str()`` is for people, :meth:`to_dict` for machines."""

    device: str
    dtype: str
    input_shape: tuple[int, ...]
    comparisons: tuple[Comparison, ...]
    checks: tuple[Check, ...]
    candidate_segmentation: Segmentation
    baseline_segmentation: Segmentation

    @property
    def ok(self) -> bool:
        return all(c.parity.ok for c in self.comparisons) and all(c.ok for c in self.checks)

    @property
    def first_failure(self) -> Comparison | None:
        """The first comparison that breaks the rule; layers come in the order in which they run."""
        return next((c for c in self.comparisons if not c.parity.ok), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        result = dataclasses.asdict(self)
        for entry, comparison in zip(result["comparisons"], self.comparisons, strict=True):
            entry["ratio"] = comparison.ratio
        return {"ok": self.ok, **result}

    def __str__(self) -> str:
        shape = "x".join(map(str, self.input_shape))
        lines = [f"{self.dtype} on {self.device}, input {shape}; errors are largest distances to float64", ""]
        width = max(len(f"{c.kind} {c.name}") for c in self.comparisons)
        lines.append(f"{'':{width}}  candidate   baseline      ratio      limit")
        for c in self.comparisons:
            label, verdict = f"{c.kind} {c.name}", "" if c.parity.ok else f"  BROKEN: {c.parity.reason}"
            lines.append(
                f"{label:{width}}  {c.parity.candidate_error:9.2e}  {c.parity.baseline_error:9.2e}  {c.ratio:9.2f}  "
                f"{c.parity.limit:9.2e}{verdict}"
            )
        lines.append("")
        for who, s in (("candidate", self.candidate_segmentation), ("baseline", self.baseline_segmentation)):
            at = f", at most {s.margin:.1e} from the decision boundary" if s.flips else ""
            lines.append(f"{who}: {s.flips} of {s.pixels} pixels of another class{at}; Dice {s.dice:.6f}")
        lines += [f"{'ok' if c.ok else 'BROKEN'}: {c.name} ({c.detail})" for c in self.checks]
        first = self.first_failure
        if first is not None:
            lines.append(f"first to break the rule: {first.kind} {first.name}, on {first.implementation}")
        lines.append("parity" if self.ok else "NO parity")
        return "\n".join(lines)


def verify(
    model: nn.Module,
    reference: nn.Module,
    inputs: Tensor,
    *,
    dtype: torch.dtype | None = None,
    deterministic: bool = True,
    rule: Rule = compare,
) -> Report:
    """Check that ``model`` computes what ``reference`` does, as accurately.

    Neither is changed: copies are cast and run, in the train or eval mode in which they come.

    Args:
        model: the candidate, usually a :class:`fastunet.FastUNet`; of it, and of a reference with
            the same parameter names, every layer is compared; of any other, the output.
        reference: any module of the same function, on the same device.
        inputs: (N, C, H, W), finite, on that device; cast to the working dtype, whose rounded
            values all three networks see.
        dtype: working dtype; by default that of the model's parameters.
        deterministic: repeat the candidate: bitwise the same, with every element written, on
            another stream (CUDA), and of our kernels at another place of the batch (torch's
            convolutions on a CPU do not promise that).
        rule: decides on each tensor; takes what :func:`fastunet.parity.compare` takes.

    Raises:
        ValueError: inputs that are not four-dimensional or finite; a reference of other weights, or
            lacking some; outputs of another shape.
    """
    if inputs.ndim != 4 or not inputs.is_floating_point():
        raise ValueError(f"inputs: expected floating (N, C, H, W), got {inputs.dtype} {tuple(inputs.shape)}")
    if not inputs.isfinite().all():
        raise ValueError("inputs: expected finite values, found NaN or infinity")
    _check_weights(model, reference)
    dtype = dtype or next(model.parameters()).dtype
    x = inputs.detach().to(dtype)
    candidate = copy.deepcopy(model).to(dtype)
    # Rounded to the working dtype first, so that all three have the very same weights.
    baseline = copy.deepcopy(reference).to(dtype)
    truth = copy.deepcopy(baseline).double()
    implementation = dispatch.choose(x.device, dtype).implementation if isinstance(model, FastUNet) else "module"

    tf32 = x.is_cuda and dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    comparisons: list[Comparison] = []

    def add(kind: str, name: str, stages: int, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
        parity = rule(ours, theirs, exact, tf32=tf32, stages=stages)
        errors = _errors(ours, exact), _errors(theirs, exact)
        comparisons.append(Comparison(kind, name, implementation, parity, *errors))

    with torch.no_grad():
        y, layers = _run_recorded(candidate, x)
        theirs, their_layers = _run_recorded(baseline, x)
        exact, exact_layers = _run_recorded(truth, x.double())
    if not y.shape == theirs.shape:
        raise ValueError(f"outputs: expected one shape, got {tuple(y.shape)} and the reference's {tuple(theirs.shape)}")
    depth = max(1, len(layers))
    for stage, name in enumerate(layers, 1):
        if name in exact_layers:
            add("layer", name, stage, layers[name], their_layers[name], exact_layers[name])
    add("output", "logits", depth, y, theirs, exact)
    checks = _repeat(candidate, x, y, implementation) if deterministic else ()
    return Report(
        str(x.device),
        str(dtype).removeprefix("torch."),
        tuple(x.shape),
        tuple(comparisons),
        tuple(checks),
        _segmentation(y, exact),
        _segmentation(theirs, exact),
    )


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


class _Operators(TorchDispatchMode):
    """Keeps the (first) result of every fused operator, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "fastunet":
            self.results.append(result[0] if isinstance(result, tuple) else result)
        return result


def _run_recorded(network: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and, of a network of ours, the result of each fused operator by its layer's name."""
    if not isinstance(network, UNet):
        return network(x), {}
    names = [layer.name for layer in trace(network.config, *x.shape[-2:], batch=len(x))]
    if isinstance(network, FastUNet):
        with _Operators() as operators:
            y = network(x)
        # Instance norm on a CPU runs the reference, without an operator.
        return y, dict(zip(names, operators.results, strict=True)) if operators.results else {}
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


def _errors(result: Tensor, truth: Tensor) -> Errors:
    off = result.double() - truth
    finite = truth.isfinite() & off.isfinite()
    off, truth = off[finite].abs(), truth[finite]
    if not finite.any():
        return Errors(0.0, 0.0, 0.0)
    size = truth.norm().item()
    return Errors(off.max().item(), off.mean().item(), off.norm().item() / size if size else off.norm().item())


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


@torch.no_grad()
def _repeat(network: nn.Module, x: Tensor, y: Tensor, implementation: str) -> list[Check]:
    """Runs of the candidate that must give bitwise what the first gave."""

    def same(name: str, again: Tensor) -> Check:
        # NaN counts as equal to itself.
        differ = int(((again != y) & ~(again.isnan() & y.isnan())).sum())
        return Check(name, differ == 0, f"{differ} elements differ" if differ else "bitwise equal")

    checks = [same("second run", network(x))]
    settings: Any = torch.utils.deterministic
    before = settings.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings.fill_uninitialized_memory = True  # torch.empty gives NaN
    torch.use_deterministic_algorithms(True, warn_only=True)  # or it does not
    try:
        poisoned = network(x)
    finally:
        settings.fill_uninitialized_memory = before[0]
        torch.use_deterministic_algorithms(before[1], warn_only=warn_only)
    unwritten = int((poisoned.isnan() & ~y.isnan()).sum())
    detail = "memory was filled with NaN before" if not unwritten else f"{unwritten} elements kept the NaN put there"
    checks.append(Check("every element written", unwritten == 0, detail))
    if x.is_cuda:
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            again = network(x)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        checks.append(same("another stream", again))
    if implementation == "triton" and len(x) > 1:
        checks.append(same("another batch position", network(x.roll(1, 0)).roll(-1, 0)))
    return checks
