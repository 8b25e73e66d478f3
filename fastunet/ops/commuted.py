"""A 3x3 convolution of an upsampled map, taken before the upsampling: a CPU's way through a wide decoder level.

    conv(up(x))[u, v] = sum over taps (k, l) of up(W_kl x)[u + k - 1, v + l - 1]

for W_kl mixes channels and ``up`` mixes pixels. So the nine products are taken at a quarter of the
pixels, and two narrow matrices, of columns and of rows, upsample, shift and add them. Exact, borders
included, for bilinear and nearest upsampling; but of a NaN or infinity the matrices make a block of NaN.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .common import channels_last, empty

_BLOCK = 32  # rows or columns that one matrix makes of 18: larger ones are mostly zeros, smaller ones many
_WIDE = 128  # channels; of fewer the products are not worth the passes over memory


def pays(x: Tensor, skip: Tensor, mode: str) -> bool:
    """Whether this is faster than upsampling first, of which it spares 3/4 of the products."""
    return mode != "none" and x.dtype == torch.float32 and x.shape[1] >= _WIDE


def upsample_concat_conv2d_relu(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, mode: str, align_corners: bool, slope: float
) -> Tensor:
    """:func:`fastunet.reference.upsample_concat_conv2d_relu`, channels_last."""
    (n, c, h, w), (height, width), o = x.shape, skip.shape[2:], weight.shape[0]
    if skip.shape[1]:
        y = channels_last(F.conv2d(skip, weight[:, c:], bias, padding=1))
    else:
        y = empty(x, o, height, width).copy_(x.new_zeros(1) if bias is None else bias[:, None, None])
    flat = y.permute(0, 2, 3, 1).view(n, height, width * o)
    pixels = channels_last(x).permute(0, 2, 3, 1).reshape(n * h * w, c)
    for k in range(3):
        products = torch.cat([pixels @ weight[:, :c, k, tap].t() for tap in range(3)], 1).view(n * h, w, 3, o)
        row = x.new_empty(n * h, width, o)  # what the three taps of row k give, at the columns that want it
        for columns, read, matrix in _blocks(w, width, mode, align_corners):
            taps = matrix.transpose(1, 2).flatten(1).expand(n * h, -1, -1)
            torch.bmm(taps, products[:, read].reshape(n * h, -1, o), out=row[:, columns])
        row = row.view(n, h, width * o)
        for rows, read, matrix in _blocks(h, height, mode, align_corners):
            flat[:, rows].baddbmm_(matrix[:, k].expand(n, -1, -1), row[:, read])
    return reference.activate_(y, slope)


@lru_cache(maxsize=64)
def _blocks(size: int, out: int, mode: str, align_corners: bool) -> list[tuple[slice, slice, Tensor]]:
    """Of an axis that goes from ``size`` pixels to ``out``: ranges of ``out``, what they read, and with which weights.

    Weights (range of out, 3 taps, pixels read): how much of each pixel a tap sees from each place of the result.
    """
    with torch.inference_mode(False):  # they outlive the call
        options: Any = {"mode": "linear", "align_corners": align_corners} if mode == "bilinear" else {"mode": mode}
        upsampled = F.interpolate(torch.eye(size, dtype=torch.float64, device="cpu")[None], scale_factor=2, **options)
        padded = F.pad(reference.pad_to(upsampled, size, out), (1, 1))[0].t().float()  # and by the convolution
        taps = torch.stack([padded[k : k + out] for k in range(3)], 1)
        blocks = []
        for start in range(0, out, _BLOCK):
            part = taps[start : start + _BLOCK]
            read = part.flatten(0, 1).any(0).nonzero().flatten().tolist() or [0]  # of padding alone: any, times 0
            pixels = slice(read[0], read[-1] + 1)
            blocks.append((slice(start, start + len(part)), pixels, part[:, :, pixels].contiguous()))
        return blocks
