"""Images of any size in, masks out: overlapping tiles, blended so that no seam shows.

A tile is cut with a halo as wide as the network's receptive field and the halo is thrown away,
so with ``nearest``, ``transpose`` or ``align_corners=False`` a tile computes what the whole image
would. Bilinear upsampling with ``align_corners=True`` and instance norm depend on the size of
what they are given; there the tiles differ slightly, and the ramp across their overlap hides it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .config import UNetConfig
from .images import limits, scale
from .reference import UNet

TILE = 1024  # pixels; a 64..1024 U-Net in float32 needs about 2 GB at this size
RAMP = 32  # pixels over which two neighbouring tiles are blended, at least


def receptive_radius(config: UNetConfig) -> int:
    """How far, in pixels, an output looks into the input, rounded up to a multiple of the reduction.

    Follows the interval that one output pixel reads down the decoder and up the encoder: a 3x3
    convolution widens it by a pixel of its level, interpolation by one of the level below.
    """
    step = config.reduction
    strides = [max(config.stride(level)) for level in range(1, config.depth + 1)]
    after_upsampling = config.upsample == "nearest_conv"  # a convolution of the finer map
    radius = 0
    for pixel in range(step):  # its place in the pooling window changes the reach
        low = high = pixel
        for level, stride in enumerate(strides):
            reach = config.convs_up(level) + after_upsampling
            low, high = (low - reach - 1) // stride, (high + reach + 1) // stride
        low, high = low - config.convs_down(config.depth), high + config.convs_down(config.depth)
        for level, stride in reversed([*enumerate(strides)]):
            reach = config.convs_down(level)
            low, high = stride * low - reach, stride * high + stride - 1 + reach
        radius = max(radius, pixel - low, high - pixel)
    return -(-radius // step) * step


def margins(config: UNetConfig, size: int, axis: int) -> tuple[int, int]:
    """Pixels to add before and behind a side of ``size``, so that the output covers it.

    None for a network whose output has the input's size. Without padding, or with skips cut to
    size, the output is smaller; to lie in the middle of the input it needs a size that every step
    down divides, as strided convolutions do anyway.
    """
    if config.keeps_size:
        return 0, 0
    whole = size
    while True:
        down, up = config.sides(whole, axis)
        lost = 2 if config.padding == "valid" else 0
        steps = (config.stride(level + 1)[axis] for level in range(config.depth))
        divides = all(side % step == 0 for side, step in zip(down, steps, strict=False))
        if divides and down[-1] > 0 and up[0] >= size and min(up) > 0:
            before = (whole - up[0]) // 2 if lost else 0
            return before, whole - size - before
        whole += 1


@torch.inference_mode()
def predict_logits(model: UNet, image: np.ndarray, *, tile: int = TILE) -> Tensor:
    """Logits of one image.

    Args:
        model: in eval mode; its device and dtype are used.
        image: (H, W) or (H, W, 3), any real dtype, any size from 1x1.
        tile: side, in pixels, of the largest map the network is given.

    Returns:
        float32 tensor (out_channels, H, W) on the CPU.

    Raises:
        ImageError: another shape, NaN or infinity, or the model takes neither 1 nor 3 channels.
        ValueError: ``model`` is in train mode, or the image needs tiles and ``tile`` is too small
            for this network.
    """
    return torch.cat([band for _, band in _bands(model, image, tile)], dim=1)


@torch.inference_mode()
def predict_mask(model: UNet, image: np.ndarray, *, tile: int = TILE) -> np.ndarray:
    """Class of each pixel, uint8 (H, W). One output channel: 1 where its logit is above 0.

    A network that ends in a sigmoid gives probabilities; there 1 is above a half.

    Only one row of tiles is held in memory at a time. Arguments and errors: :func:`predict_logits`;
    also ValueError for a model of more than 256 classes.
    """
    if model.config.out_channels > 256:
        raise ValueError(f"model: expected at most 256 classes, got {model.config.out_channels}")
    mask = np.empty(image.shape[:2], dtype=np.uint8)
    for top, band in _bands(model, image, tile):
        found = band[0] > model.config.threshold if len(band) == 1 else band.argmax(0)
        mask[top : top + band.shape[1]] = found.numpy()
    return mask


def _bands(model: UNet, image: np.ndarray, tile: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, float32 logits (out_channels, rows, W) on the CPU), top to bottom."""
    if model.training:
        # Batch norm would normalise each tile by itself, and remember it.
        raise ValueError("model: expected eval mode, got train mode; call model.eval() first")
    config = model.config
    between = limits(image, config.in_channels)
    height, width = image.shape[:2]
    # Maps smaller than the poolings allow are edge-padded, and what they gain is cut off again.
    # Instance norm cannot normalise a bottleneck of one pixel: there it gets two.
    least = config.minimum_size if config.keeps_size else config.reduction
    wide = 2 * least if config.norm == "instance" and height < 2 * least else least
    below, right_of = max(0, least - height), max(0, wide - width)
    padded_height, padded_width = height + below, width + right_of

    halo, ramp = receptive_radius(config), max(RAMP, config.reduction)
    rows, cols = (_spans(size, tile, 2 * halo + ramp, config.reduction) for size in (padded_height, padded_width))
    parameter = next(model.parameters())
    band = torch.zeros(config.out_channels, 0, padded_width)
    weight = torch.zeros(0, padded_width)
    for index, (top, bottom) in enumerate(rows):
        # The rows that the tiles above reached into are begun; the others are new.
        band = F.pad(band, [0, 0, 0, bottom - top - band.shape[1]])
        weight = F.pad(weight, [0, 0, 0, bottom - top - len(weight)])
        vertical = _window(top, bottom, padded_height, halo, ramp)
        x = scale(image[top:bottom], config.in_channels, between)[None]
        x = F.pad(x, [0, right_of, 0, below], mode="replicate")
        for left, right in cols:
            part = x[..., left:right].to(parameter.device, parameter.dtype)
            window = vertical[:, None] * _window(left, right, padded_width, halo, ramp)
            band[:, :, left:right] += _same_size(model, part)[0].float().cpu() * window
            weight[:, left:right] += window
        done = rows[index + 1][0] - top if index + 1 < len(rows) else bottom - top
        yield top, (band[:, :done] / weight[:done])[:, : height - top, :width]
        band, weight = band[:, done:], weight[done:]


def _same_size(model: UNet, x: Tensor) -> Tensor:
    """The output for each pixel of x, whose border is repeated where the network wants more of it."""
    (above, below), (left, right) = (margins(model.config, x.shape[2 + axis], axis) for axis in (0, 1))
    if above or below or left or right:
        x, (height, width) = F.pad(x, [left, right, above, below], mode="replicate"), x.shape[2:]
        return model(x)[..., :height, :width]
    return model(x)


def _spans(size: int, tile: int, overlap: int, step: int) -> list[tuple[int, int]]:
    """Cover [0, size) with windows of at most ``tile`` that start at multiples of ``step``."""
    if size <= tile:
        return [(0, size)]
    tile = tile // step * step  # so that poolings cut a tile where they cut the whole image
    if tile < overlap + step:
        raise ValueError(f"tile: expected at least {overlap + step} pixels for this network, got {tile}")
    return [(start, min(start + tile, size)) for start in range(0, size - overlap, tile - overlap)]


def _window(start: int, stop: int, size: int, halo: int, ramp: int) -> Tensor:
    """Blending weights (stop - start,): 0 in the halo, a linear ramp, 1 inside; 1 at image borders."""
    position = torch.arange(start, stop) + 0.5
    weight = torch.ones(stop - start)
    if start > 0:
        weight = torch.minimum(weight, ((position - start - halo) / ramp).clamp(0, 1))
    if stop < size:
        weight = torch.minimum(weight, ((stop - halo - position) / ramp).clamp(0, 1))
    return weight
