"""Convolutions before a norm, and the norm's statistics: what Hopper's do in one pass (hopper/conv3x3.py), in two.

    y as in conv3x3.py and upconcat_conv3x3.py, without an activation; mean, 1 / sqrt(var + eps) and unbiased var of y

of each channel, (O,), or of each image's, (N, O): float32.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .conv3x3 import conv_fwd
from .norm import Moments, statistics
from .tensors import without_graph
from .upconcat_conv3x3 import upconcat_conv3x3_fwd


@without_graph
def conv_moments_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, per_image: bool, **options: Any
) -> Moments:
    """y, mean, rstd, variance; options as of :func:`conv_fwd`, but for the slope."""
    y = conv_fwd(x, weight, bias, slope=1.0, **options)
    return y, *statistics(y, eps, per_image)


@without_graph
def upconcat_conv3x3_moments_fwd(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, per_image: bool, **options: Any
) -> Moments:
    """y, mean, rstd, variance; options as of :func:`upconcat_conv3x3_fwd`, but for the slope."""
    y = upconcat_conv3x3_fwd(x, skip, weight, bias, slope=1.0, **options)
    return y, *statistics(y, eps, per_image)
