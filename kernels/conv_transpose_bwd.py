"""Gradients of a transposed convolution whose stride is its filter's size: a decoder's upsampling (conv_transpose.py).

    grad_x[n, c, h, w]       = sum over o, i, j of weight[c, o, i, j] grad[n, o, s h + i, t w + j]
    grad_weight[c, o, i, j]  = sum over n, h, w of grad[n, o, s h + i, t w + j] x[n, c, h, w]
    grad_bias[o]             = sum over n, u, v of grad[n, o, u, v]

Both are 1x1: ``grad``, whose rows lie s apart and whose t neighbours of a row are the channels of one pixel, is s
sources of the kernels of a convolution (upconcat_conv3x3.py, conv_bwd.py), read in place; but for grad_x of 3 rows or
more, which that kernel of two sources does not take, ``grad`` is copied.

Shapes: grad (N, O, s H, t W), x (N, C, H, W), weight (C, O, s, t); float16, bfloat16 or float32, sums in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .conv3x3 import conv_fwd
from .conv_bwd import wgrad
from .reduce_slabs import reduce_slabs
from .tensors import without_graph
from .tuning import ConvConfig, WgradConfig
from .upconcat_conv3x3 import upconcat_conv3x3_fwd


def _rows_of_taps(grad: Tensor, rows: int, columns: int) -> list[Tensor]:
    """``rows`` times (N, columns * O, H, W): neighbours of a row as the channels of one pixel; views if NHWC."""
    n, o, h, w = grad.shape
    pixels = grad.permute(0, 2, 3, 1).reshape(n, h // rows, rows, w // columns, columns * o)
    return [pixels[:, :, i].permute(0, 3, 1, 2) for i in range(rows)]


@without_graph
def conv_transpose_dgrad(
    grad: Tensor, weight: Tensor, *, tf32: bool = True, config: ConvConfig | None = None
) -> Tensor:
    """Gradient of the input, (N, C, H, W), channels_last. ``tf32`` and ``config`` as in :func:`conv_fwd`."""
    rows = _rows_of_taps(grad, *weight.shape[2:])
    filters = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1, 1, 1)
    if len(rows) == 2:
        options: Any = {"mode": "none", "align_corners": False}
        return upconcat_conv3x3_fwd(*rows, filters, None, slope=1.0, tf32=tf32, config=config, **options)
    x = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
    return conv_fwd(x, filters, None, slope=1.0, tf32=tf32, config=config)


@without_graph
def conv_transpose_wgrad(
    grad: Tensor, x: Tensor, *, bias: bool, tf32: bool = True, config: WgradConfig | None = None
) -> tuple[Tensor, Tensor | None]:
    """As :func:`conv_wgrad`, of the same convolution, in which x and ``grad`` change places.

    Returns:
        grad_weight (C, O, s, t), channels_last; grad_bias (O,) or None.
    """
    (_, c, h, w), o = x.shape, grad.shape[1]
    taps = grad.shape[2] // h, grad.shape[3] // w
    rows, sums = wgrad(x, _rows_of_taps(grad, *taps), 1, (1, 1), 0, (h, w), "x" if bias else None, tf32, config)
    weight = rows.permute(0, 2, 3, 1).reshape(c, *taps, o).permute(0, 3, 1, 2)
    return weight, None if sums is None else reduce_slabs(sums.view(-1, o), grad.dtype)  # of all taps
