"""Dice of a network on whole images, by torchmetrics."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..predict import predict_logits
from ..reference import UNet
from .data import Data
from .loss import ending_in_logits, segmentation_loss
from .processes import Processes


class Scores(NamedTuple):
    """Of the validation images; Dice is the mean over foreground classes."""

    loss: float
    dice: float  # over the pixels of all images together
    mean_dice: float  # mean of the images' own, those without foreground in mask and finding left out


def validate(model: UNet, data: Data, dice_weight: float, process: Processes) -> Scores:
    """Scores of ``model``, which is left in eval mode, on ``data.val``; several processes share the images.

    Every process gets the scores of all. Buffers (running statistics) are made those of the first.
    """
    from torchmetrics.aggregation import MeanMetric  # optional, and takes seconds to import
    from torchmetrics.segmentation import DiceScore

    if process.count > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    classes = max(2, data.classes)
    options = {"include_background": False, "average": "macro", "input_format": "index"}
    pooled = DiceScore(classes, aggregation_level="global", **options).to(process.device)
    by_image = DiceScore(classes, aggregation_level="samplewise", **options).to(process.device)
    loss = MeanMetric().to(process.device)
    model.eval()
    for pair in data.val[process.rank :: process.count]:
        image, mask = pair.read(data.classes)
        with ending_in_logits(model):
            logits = predict_logits(model, image)[None].to(process.device)
        target = torch.from_numpy(mask)[None].to(process.device, torch.long)
        found = classes_of(model.finish(logits), model.config.threshold)
        pooled.update(found, target)
        by_image.update(found, target)
        loss.update(segmentation_loss(logits, target, dice_weight))
    return Scores(*(float(metric.compute()) for metric in (loss, pooled, by_image)))


def classes_of(outputs: Tensor, threshold: float) -> Tensor:
    """(N, C, H, W) -> (N, H, W) int64: the largest, or, of a single channel, whether it is above ``threshold``."""
    return (outputs[:, 0] > threshold).long() if outputs.shape[1] == 1 else outputs.argmax(1)
