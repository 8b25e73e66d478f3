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
    tensors = [t for t in step.arguments if isinstance(t, Tensor)]
    if not tensors or not all(t.isfinite().all() for t in tensors):
        return  # what made them so is for the layer before to answer
    theirs, _ = _reference(step.arguments, smallest)
    wide = tuple(t.double() if isinstance(t, Tensor) else t for t in step.arguments)
    exact, terms = _reference(wide, smallest)
    results = [(step.result, theirs, exact)]
    if step.pooled is not None:
        results.append((step.pooled, F.max_pool2d(theirs, 2), F.max_pool2d(exact, 2)))
    for mine, base, true in results:
        yield Alone(compare(mine, base, true, terms=terms), distance(mine, true), distance(base, true))


def _reference(arguments: tuple[Any, ...], smallest: float) -> tuple[Tensor, float]:
    """What an operator of these arguments must give, and the size of its terms."""
    slope, given = 1.0, list[Any](arguments)
    if len(given) > 4:
        x, skip, weight, bias, mode, align_corners, slope, match = (given + ["zero_pad"])[:8]
        x = torch.cat(reference.fit(reference.upsample(x, mode, align_corners), skip, match), 1)
    elif len(given) == 4:
        x, weight, bias, slope = given
    else:
        x, weight, bias = given

    def operator(x: Tensor, weight: Tensor, bias: Tensor | None, slope: float) -> Tensor:
        if len(given) == 3:
            return reference.conv_transpose2x2(x, weight, bias)
        return reference.conv2d_relu(x, weight, bias, slope)

    y = operator(x, weight, bias, slope)
    squares = (x**2).clamp(min=smallest**2), weight**2, None if bias is None else bias**2
    terms = operator(*squares, 1.0)
    return y, terms.max().sqrt().item() if terms.numel() else 0.0
