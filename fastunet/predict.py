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
from .images import normalise
from .reference import UNet

TILE = 1024  # pixels; a 64..1024 U-Net in float32 needs about 2 GB at this size
RAMP = 32  # pixels over which two neighbouring tiles are blended


def receptive_radius(config: UNetConfig) -> int:
    """How far, in pixels, an output looks into the input; a multiple of the pooling.

    At level i a pixel is 2**i wide and two 3x3 convolutions reach two of them, in the encoder
    and again in the decoder; bilinear upsampling reaches one pixel of the level below.
    """
    reach = 2 * 2**config.depth
    for level in range(config.depth):
        reach += 4 * 2**level + 2 ** (level + 1)
    step = config.minimum_size
    return -(-reach // step) * step


def _spans(size: int, tile: int, overlap: int, step: int) -> list[tuple[int, int]]:
    """Cover [0, size) with windows of at most ``tile`` whose starts are multiples of ``step``."""
    if size <= tile:
        return [(0, size)]
    stride = (tile - overlap) // step * step
    starts = list(range(0, size - overlap, stride))
    return [(start, min(start + tile, size)) for start in starts]


def _window(start: int, stop: int, size: int, halo: int) -> Tensor:
    """Blending weights of one span: 0 in the halo, a linear ramp, 1 inside; 1 at image borders."""
    position = torch.arange(stop - start, dtype=torch.float32)
    weight = torch.ones(stop - start)
    if start > 0:
        weight = torch.minimum(weight, ((position - halo + 0.5) / RAMP).clamp(0, 1))
    if stop < size:
        weight = torch.minimum(weight, ((stop - start - halo - position - 0.5) / RAMP).clamp(0, 1))
    return weight


def _bands(model: UNet, x: Tensor, tile: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, logits (C, rows, W)) of finished bands, top to bottom."""
    config = model.config
    parameter = next(model.parameters())
    halo = receptive_radius(config)
    _, height, width = x.shape
    overlap = 2 * halo + RAMP
    step = config.minimum_size
    if tile < 2 * overlap:
        raise ValueError(f"tile: expected at least {2 * overlap} pixels for this network, got {tile}")
    rows, cols = _spans(height, tile, overlap, step), _spans(width, tile, overlap, step)
    carried = carried_weight = None
    for index, (top, bottom) in enumerate(rows):
        band = torch.zeros(config.out_channels, bottom - top, width)
        weight = torch.zeros(bottom - top, width)
        if carried is not None and carried_weight is not None:
            band[:, : carried.shape[1]], weight[: carried.shape[1]] = carried, carried_weight
        vertical = _window(top, bottom, height, halo)
        for left, right in cols:
            part = x[None, :, top:bottom, left:right].to(parameter.device, parameter.dtype)
            logits = _run(model, part)
            window = vertical[:, None] * _window(left, right, width, halo)[None]
            band[:, :, left:right] += logits * window
            weight[:, left:right] += window
        done = rows[index + 1][0] - top if index + 1 < len(rows) else bottom - top
        yield top, band[:, :done] / weight[:done]
        carried, carried_weight = band[:, done:], weight[done:]


def _run(model: UNet, x: Tensor) -> Tensor:
    """Logits (C, H, W) in float32 on the CPU; maps smaller than the network allows are edge-padded."""
    height, width = x.shape[-2:]
    least = model.config.minimum_size
    if height < least or width < least:
        x = F.pad(x, [0, max(0, least - width), 0, max(0, least - height)], mode="replicate")
    return model(x)[0, :, :height, :width].float().cpu()


@torch.inference_mode()
def predict_logits(model: UNet, image: np.ndarray, *, tile: int = TILE) -> Tensor:
    """Logits of one image.

    Args:
        model: in eval mode; its device and dtype are used.
        image: (H, W) or (H, W, 3), any real dtype, any size from 1x1.
        tile: side, in pixels, of the largest map the network is given.

    Returns:
        float32 tensor (out_channels, H, W) on the CPU.
    """
    x = normalise(image, model.config.in_channels)
    return torch.cat([band for _, band in _bands(model, x, tile)], dim=1)


@torch.inference_mode()
def predict_mask(model: UNet, image: np.ndarray, *, tile: int = TILE) -> np.ndarray:
    """Class of each pixel, uint8 (H, W). One output channel: 1 where its logit is above 0.

    Only one band of tiles is held in memory at a time. Arguments: :func:`predict_logits`.
    """
    x = normalise(image, model.config.in_channels)
    mask = np.empty(x.shape[1:], dtype=np.uint8)
    for top, band in _bands(model, x, tile):
        found = band[0] > 0 if band.shape[0] == 1 else band.argmax(0)
        mask[top : top + band.shape[1]] = found.numpy()
    return mask
