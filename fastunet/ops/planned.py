"""Which calls go by a plan: those of a kind that came twice before."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..sources import Generation
from .common import is_rounded, surroundings
from .plan import Plan
from .recorder import Overlapping, Unrepeatable, recorded


class Instead(Enum):
    """What is kept in a plan's place."""

    NOT_YET = "this kind of arguments came, and may get a plan"
    NEVER = "no plan can do what the function does"


def kind(*arguments: Any) -> Hashable:
    """What decides what our functions do with them, but for the values in tensors, of which the first one is.

    Not what flags PyTorch's operators read themselves, each time, such as ``torch.backends.cudnn.benchmark``.
    """
    found = [
        (a.shape, a.stride(), a.dtype, a.data_ptr() % 16, is_rounded(a))  # code is compiled for aligned memory apart
        if isinstance(a, Tensor)
        else tuple(a)
        if isinstance(a, list)
        else a
        for a in arguments
    ]
    return *found, *surroundings(arguments[0].device), torch.is_inference_mode_enabled()


def planned(
    kept: Generation[Plan | Instead],
    key: Hashable,
    run: Callable[..., Any],
    arguments: Sequence[Any],
    constants: Callable[[], Sequence[Tensor] | None] = tuple,
) -> Any:
    """``run(*arguments)``: by a plan, when the key comes for the third time, which is made at the second.

    What no plan can do is not tried again.

    Args:
        key: of ``run`` and the :func:`kind` of its arguments.
        constants: asked before a plan is made: all memory beside the arguments' that it may read; None if none may be
            made.
    """
    plan = kept.find(key)
    if isinstance(plan, Plan):
        return plan(*arguments)
    if plan is None:
        found, plan = run(*arguments), Instead.NOT_YET  # which compiles kernels and lays out weights
    elif plan is Instead.NEVER or (known := constants()) is None:
        found, plan = run(*arguments), Instead.NEVER
    else:
        try:
            found, plan = recorded(run, arguments, known)
        except Overlapping:
            found, plan = run(*arguments), Instead.NOT_YET
        except Unrepeatable:
            found, plan = run(*arguments), Instead.NEVER
    kept.keep(key, plan)
    return found
