"""Each layer by itself: the reference's layer on the candidate's own input.

In a network's run the errors of the layers before come to a layer's own, in the baseline as in the
candidate, and a sum kept in half the precision drowns in them. On the same input only that layer's
roundings are left, so that such a fault shows, and in its own layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import UNet, activate_, pad_to, upsample
from ..trace import Layer
from .measures import distance
from .recording import Step, is_folded, norm_after
from .report import Alone
from .rule import Parity
from .terms import term_roots, through_norm


@torch.no_grad()
def alone(
    layer: Layer, step: Step, baseline: UNet, truth: UNet, compare: Callable[..., Parity], smallest: float
) -> Iterator[Alone]:
    """The layer's result, then its max-pool if it has one, against the reference's; nothing for infinite inputs.

    Args:
        compare: the rule, its settings made; takes candidate, baseline, truth and ``terms``.
        smallest: the working dtype's smallest normal number.
    """
    if not all(t.isfinite().all() for t in step.inputs):
        return  # what made it so is for the layer before to answer
    theirs, _ = _reference(baseline, layer, step.inputs, smallest)
    exact, terms = _reference(truth, layer, tuple(t.double() for t in step.inputs), smallest)
    results = [(step.result, theirs, exact)]
    if step.pooled is not None:
        results.append((step.pooled, F.max_pool2d(theirs, 2), F.max_pool2d(exact, 2)))
    for mine, base, true in results:
        yield Alone(compare(mine, base, true, terms=terms), distance(mine, true), distance(base, true))


def _reference(network: UNet, layer: Layer, inputs: tuple[Tensor, ...], smallest: float) -> tuple[Tensor, float]:
    """What FastUNet's operator must give, from the network's own modules, and the size of its terms."""
    config, x = network.config, inputs[0]
    if len(inputs) == 2:
        skip = inputs[1]
        x = pad_to(upsample(x, layer.mode, config.align_corners), *skip.shape[2:])
        x = torch.cat([x, skip] if config.concat == "upsampled_first" else [skip, x], 1)
    conv: Any = network.get_submodule(layer.name)
    y, roots = conv(x), term_roots(conv, (x**2).clamp(min=smallest**2))
    norm: Any = norm_after(network, layer)
    apart = norm is not None and config.order == "conv_norm_act" and not is_folded(norm, config)
    if norm is not None and is_folded(norm, config):
        roots, y = through_norm(roots, norm, y), norm(y)
    if layer.activation is not None and not apart:
        y = activate_(y, config.slope)
    return y, roots.max().item() if roots.numel() else 0.0
