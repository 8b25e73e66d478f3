"""The error over the image: a mistake at a border or a tile's seam is a line there."""

from __future__ import annotations

import io

import torch
import torch.nn.functional as F

from .report import Report


def draw(report: Report) -> bytes:
    """A PNG of the candidate's and the baseline's errors over the image where the candidate's is largest.

    The colour is the logarithm of a pixel's largest error among its logits, on one scale for both
    maps; pixels without an error have the lowest colour.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    worst = int(report.candidate_map.flatten(1).nan_to_num(torch.inf).amax(1).argmax())
    # A seam of one pixel must survive on a small picture: each dot shows the largest error beneath it.
    step = -(-max(report.candidate_map.shape[1:]) // 512)
    maps = {
        name: F.max_pool2d(errors[worst][None], step, ceil_mode=True)[0]
        for name, errors in (("candidate", report.candidate_map), ("baseline", report.baseline_map))
    }
    positive = [float(value) for m in maps.values() for value in m[(m > 0) & m.isfinite()]]
    highest = max(positive, default=1.0)
    # Six decades at most: what is smaller than a millionth of the largest error tells nothing.
    lowest = max(min(positive, default=0.1), highest * 1e-6)
    norm = LogNorm(lowest, max(highest, lowest * 10))
    height, width = report.candidate_map.shape[1:]
    figure = Figure(figsize=(10, 1.2 + 4.4 * min(height / width, 2)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, (name, errors) in zip(axes, maps.items(), strict=True):
        axis.imshow(
            errors.clamp(min=lowest).numpy(),
            norm=norm,
            cmap="magma",
            interpolation="nearest",
            extent=(0, width, height, 0),
        )
        axis.set_title(f"{name}: largest error {errors.max().item():.1e}")
    figure.colorbar(axes[0].images[0], ax=axes, label="|logit - float64|, largest of a pixel's")
    shape = "x".join(map(str, report.input_shape))
    figure.suptitle(
        f"{report.dtype} on {report.device}, input {shape}, image {worst + 1} of {len(report.candidate_map)}"
    )
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()
