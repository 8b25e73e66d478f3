"""Whether a model gives the same again, to the bit: on another run, in other memory, with changed weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..model import FastUNet
from .report import Check

Tensors = dict[str, Tensor]
_LATE_CYCLES = 100_000_000  # of a GPU's clock: some 50 ms, longer than a launch takes


def same(name: str, first: Tensors, again: Tensors) -> Check:
    """Bitwise equality of all tensors, the sign of zeros included; NaN counts as equal to itself."""
    for key, y in first.items():
        other = again[key]
        differ = int((((other != y) | (other.signbit() != y.signbit())) & ~(other.isnan() & y.isnan())).sum())
        if differ:
            return Check(name, False, f"{differ} elements of {key} differ")
    return Check(name, True, "bitwise equal")


def repeat(
    prefix: str, first: Tensors, run: Callable[[Tensor], Tensors], x: Tensor, *, steady: bool
) -> Iterator[Check]:
    """Runs of a model on x that must give bitwise what the first gave.

    Args:
        steady: the poisoned run computes as the others do. PyTorch fills memory in its
            deterministic mode alone, in which its own CUDA operators may be other ones.
    """
    yield same(f"{prefix}second run", first, run(x))
    with poisoned_memory():
        poisoned = run(x)
    name = f"{prefix}every element written"
    unwritten = {key: int((t.isnan() & ~first[key].isnan()).sum()) for key, t in poisoned.items()}
    kept = next((f"{n} elements of {key} kept the NaN put there" for key, n in unwritten.items() if n), None)
    if kept is not None:
        yield Check(name, False, kept)
    elif steady and not same(name, first, poisoned).ok:  # the NaN was read and lost on the way
        yield Check(name, False, f"over memory filled with NaN, {same(name, first, poisoned).detail}")
    else:
        yield Check(name, True, "memory was filled with NaN before")
    if x.is_cuda:
        # The input is late on that stream, so that work on any other would start without it.
        stream, late = torch.cuda.Stream(x.device), torch.zeros_like(x)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(_LATE_CYCLES)
            late.copy_(x)
            again = run(late)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        yield same(f"{prefix}another stream", first, again)


@torch.no_grad()
def fresh(model: FastUNet, candidate: FastUNet, x: Tensor) -> list[Check]:
    """Prepared weights are those of now: in the model as it came, and after each kind of change in place.

    Args:
        candidate: the model's copy in the working dtype, in eval mode; its weights are changed.
        x: inputs of that dtype. Where a CPU would leave them to the reference network, the operators run all the same.
    """
    own = x.to(next(model.parameters()).dtype)
    on_torch = candidate.runs_on_plain_torch(x) or model.runs_on_plain_torch(own)
    with ops.watched() if on_torch else contextlib.nullcontext():
        return list(_fresh(model, own, candidate, x))


def _fresh(model: FastUNet, own: Tensor, candidate: FastUNet, x: Tensor) -> Iterator[Check]:
    # A copy has nothing of the original's prepared weights.
    yield same("the model itself, not a copy", {"logits": copy.deepcopy(model)(own)}, {"logits": model(own)})

    def changed(what: str) -> Check:
        found = candidate(x)
        for module in candidate.modules():
            if isinstance(module, FastUNet):
                module.refresh()
        return same(f"after {what}", {"logits": candidate(x)}, {"logits": found})

    norms = [module for module in candidate.modules() if isinstance(module, nn.BatchNorm2d)]
    of_norms = {id(t) for norm in norms for t in norm.state_dict(keep_vars=True).values()}
    groups = {
        "weights changed in place": [p for p in candidate.parameters() if id(p) not in of_norms],
        "norms changed in place": [p for norm in norms for p in norm.parameters()],
        "statistics changed in place": [b for norm in norms for b in norm.buffers() if b.is_floating_point()],
    }
    for what, tensors in groups.items():
        for tensor in tensors:
            tensor.mul_(1.25)
        if tensors:
            yield changed(what)
    if any(norm.running_mean is not None for norm in norms):
        # It updates them without counting a version. Of x twice, as a single value has no variance.
        candidate.train()(torch.cat([x, x]))
        candidate.eval()
        yield changed("a step of training")


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the block, torch.empty gives NaN."""
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
