"""How far a result is from the truth: in numbers, in classes, over the image."""

from __future__ import annotations

from torch import Tensor

from .report import Errors, Segmentation


def distance(result: Tensor, truth: Tensor) -> Errors:
    """Errors of a result, over the elements that are finite in both."""
    off = result.double() - truth
    finite = truth.isfinite() & off.isfinite()
    off, truth = off[finite].abs(), truth[finite]
    if not finite.any():
        return Errors(0.0, 0.0, 0.0)
    size = truth.norm().item()
    return Errors(off.max().item(), off.mean().item(), off.norm().item() / size if size else off.norm().item())


def error_map(logits: Tensor, truth: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W) float32 on the CPU: the largest error among a pixel's logits."""
    return (logits.double() - truth).abs().amax(1).float().cpu()


def segmentation(logits: Tensor, truth: Tensor, threshold: float = 0.0) -> Segmentation:
    """Classes of (N, C, H, W) logits against the truth's; a single channel is cut at ``threshold``."""

    def classes(t: Tensor) -> Tensor:
        return (t[:, 0] > threshold).long() if t.shape[1] == 1 else t.argmax(1)

    found, expected = classes(logits), classes(truth)
    flipped = found != expected
    if truth.shape[1] == 1:
        margin = (truth[:, 0] - threshold).abs()
    else:
        top = truth.topk(2, dim=1).values
        margin = top[:, 0] - top[:, 1]
    dice, iou = [], []
    for label in range(1, max(2, truth.shape[1])):
        ours, theirs = found == label, expected == label
        both, either = (ours & theirs).sum().item(), (ours | theirs).sum().item()
        dice.append(2 * both / (both + either) if either else 1.0)
        iou.append(both / either if either else 1.0)
    margins = margin[flipped]
    median, largest = (margins.median().item(), margins.max().item()) if len(margins) else (0.0, 0.0)
    return Segmentation(len(margins), flipped.numel(), tuple(dice), tuple(iou), median, largest)
