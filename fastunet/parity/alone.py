"""Each operator by itself: the reference's, of the very tensors that the candidate gave its own.

In a network's run the errors of the layers before come to a layer's own, in the baseline as in the
candidate, and a sum kept in half the precision drowns in them. On the same map, weight and bias only
that operator's roundings are left, so that such a fault shows, and in its own layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .measures import distance
from .recording import Step
from .report import Alone
from .rule import Parity


@torch.no_grad()
def alone(step: Step, compare: Callable[..., Parity], smallest: float) -> Iterator[Alone]:
    """An operator's result, then its max-pool if it has one, against the reference's; nothing for infinite inputs.

    Args:
        compare: the rule, its settings made; takes candidate, baseline, truth and ``terms``.
        smallest: the working dtype's smallest normal number.
    """
    tensors = [t for t in step.arguments.values() if isinstance(t, Tensor)]
    if not tensors or not all(t.isfinite().all() for t in tensors):
        return  # what made them so is for the layer before to answer
    theirs, _ = _reference(step.arguments, smallest)
    wide = {name: t.double() if isinstance(t, Tensor) else t for name, t in step.arguments.items()}
    exact, terms = _reference(wide, smallest)
    results = [(step.result, theirs, exact)]
    if step.pooled is not None:
        results.append((step.pooled, F.max_pool2d(theirs, 2), F.max_pool2d(exact, 2)))
    for mine, base, true in results:
        yield Alone(compare(mine, base, true, terms=terms), distance(mine, true), distance(base, true))


def _reference(arguments: dict[str, Any], smallest: float) -> tuple[Tensor, float]:
    """What an operator of these arguments must give, and the size of its terms."""
    left = dict(arguments)
    x, weight, bias = (left.pop(name) for name in ("x", "weight", "bias"))
    if "skip" in left:
        skip, mode, align_corners, match = (left.pop(name) for name in ("skip", "mode", "align_corners", "match"))
        x = torch.cat(reference.fit(reference.upsample(x, mode, align_corners), skip, match), 1)
    operator: Any = reference.conv2d_relu if "slope" in left else reference.conv_transpose2x2
    y = operator(x, weight, bias, **left)
    squares = (x**2).clamp(min=smallest**2), weight**2, None if bias is None else bias**2
    terms = operator(*squares, **left | ({"slope": 1.0} if left else {}))
    return y, terms.max().sqrt().item() if terms.numel() else 0.0
