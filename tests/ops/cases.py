"""Every operator, as a call and as plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastunet import ops, reference


def replicated(x, skip, weight, bias, mode):
    """The operator that repeats the upsampled map's border, by torch alone."""
    if mode == "bilinear":
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    rows, columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
    pad = [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
    x = F.pad(x, pad, mode="replicate")
    return F.relu(F.conv2d(torch.cat([x, skip], 1), weight, bias, padding=1))


def fixed(x) -> dict[str, Any]:
    """Statistics for three channels, of x's dtype."""
    mean, variance = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([0.3, 1.0, 4.0])
    return {"running_mean": mean.to(x), "running_var": variance.to(x)}


# name -> (call on float inputs, the same with plain torch, input shapes)
CASES = {
    "conv2d_relu": (
        ops.conv2d_relu,
        lambda x, w, b: reference.conv2d_relu(x, w, b, 0.0),
        [(2, 3, 5, 6), (4, 3, 3, 3), (4,)],
    ),
    "conv2d_leaky_pool": (
        lambda x, w, b: ops.conv2d_relu(x, w, b, negative_slope=0.2, pool=True),
        lambda x, w, b: (y := reference.conv2d_relu(x, w, b, 0.2), F.max_pool2d(y, 2)),
        [(2, 3, 5, 6), (4, 3, 3, 3), (4,)],
    ),
    "conv1x1_linear": (
        lambda x, w: ops.conv2d_relu(x, w, relu=False),
        lambda x, w: reference.conv2d_relu(x, w, None, 1.0),
        [(2, 3, 1, 4), (1, 3, 1, 1)],
    ),
    "conv2d_relu_head": (
        ops.conv2d_relu_head,
        lambda x, w, b, hw, hb: F.conv2d(F.relu(F.conv2d(x, w, b, padding=1)), hw, hb),
        [(2, 3, 5, 6), (4, 3, 3, 3), (4,), (2, 4, 1, 1), (2,)],
    ),
    "conv2d_relu_wide_head": (  # of more classes than go with a tile
        lambda x, w, h: ops.conv2d_relu_head(x, w, None, h, negative_slope=0.1),
        lambda x, w, h: F.conv2d(F.leaky_relu(F.conv2d(x, w, padding=1), 0.1), h),
        [(2, 3, 5, 6), (4, 3, 3, 3), (17, 4, 1, 1)],
    ),
    "strided": (
        lambda x, w, b: ops.conv2d_relu(x, w, b, stride=(2, 1)),
        lambda x, w, b: F.relu(F.conv2d(x, w, b, stride=(2, 1), padding=1)),
        [(2, 3, 5, 6), (4, 3, 3, 3), (4,)],
    ),
    "unpadded": (
        lambda x, w, b: ops.conv2d_relu(x, w, b, negative_slope=0.1, padding="valid"),
        lambda x, w, b: F.leaky_relu(F.conv2d(x, w, b), 0.1),
        [(2, 3, 5, 6), (4, 3, 3, 3), (4,)],
    ),
    "unpadded_pool": (
        lambda x, w: ops.conv2d_relu(x, w, pool=True, padding="valid"),
        lambda x, w: (y := F.relu(F.conv2d(x, w)), F.max_pool2d(y, 2)),
        [(2, 3, 5, 7), (4, 3, 3, 3)],
    ),
    "batch_norm_relu": (
        lambda x, w, b: ops.batch_norm_relu(x, w, b, negative_slope=0.1)[0],
        lambda x, w, b: F.leaky_relu(F.batch_norm(x, None, None, w, b, True), 0.1),
        [(2, 3, 5, 6), (3,), (3,)],
    ),
    "batch_norm_pool": (
        lambda x: ops.batch_norm_relu(x, relu=False, pool=True)[:2],
        lambda x: (y := F.batch_norm(x, None, None, None, None, True), F.max_pool2d(y, 2)),
        [(2, 3, 5, 6)],
    ),
    "fixed_norm_pool": (
        lambda x, w, b: ops.batch_norm_relu(x, w, b, negative_slope=0.1, pool=True, **fixed(x))[:2],
        lambda x, w, b: (y := F.leaky_relu(F.batch_norm(x, **fixed(x), weight=w, bias=b), 0.1), F.max_pool2d(y, 2)),
        [(2, 3, 5, 6), (3,), (3,)],
    ),
    "instance_norm_relu": (
        lambda x, w, b: ops.instance_norm_relu(x, w, b, negative_slope=0.1)[0],
        lambda x, w, b: F.leaky_relu(F.instance_norm(x, weight=w, bias=b), 0.1),
        [(2, 3, 5, 6), (3,), (3,)],
    ),
    "instance_norm_pool": (
        lambda x: ops.instance_norm_relu(x, relu=False, pool=True),
        lambda x: (y := F.instance_norm(x), F.max_pool2d(y, 2)),
        [(2, 3, 5, 6)],  # of one image PyTorch 2.13's gradient is wrong, where that of y comes in channels_last
    ),
    "upsample_concat": (
        ops.upsample_concat,
        lambda x, s: reference.upsample_concat(x, s, "bilinear", True),
        [(2, 3, 2, 3), (2, 2, 5, 7)],
    ),
    "upsample_concat_cropped": (
        lambda x, s: ops.upsample_concat(x, s, mode="nearest"),
        lambda x, s: reference.upsample_concat(x, s, "nearest", True),
        [(1, 3, 3, 3), (1, 2, 5, 4)],
    ),
    "upsample_concat_conv2d_relu": (
        lambda x, s, w, b: ops.upsample_concat_conv2d_relu(x, s, w, b, align_corners=False),
        lambda x, s, w, b: reference.upsample_concat_conv2d_relu(x, s, w, b, "bilinear", False, 0.0),
        [(2, 3, 2, 3), (2, 2, 5, 6), (4, 5, 3, 3), (4,)],
    ),
    "replicated": (
        lambda x, s, w, b: ops.upsample_concat_conv2d_relu(x, s, w, b, match="replicate_pad"),
        lambda x, s, w, b: replicated(x, s, w, b, "bilinear"),
        [(2, 3, 2, 3), (2, 2, 6, 9), (4, 5, 3, 3), (4,)],
    ),
    "replicated_alone": (
        lambda x, s, w, b: ops.upsample_concat_conv2d_relu(x, s, w, b, mode="none", match="replicate_pad"),
        lambda x, s, w, b: replicated(x, s, w, b, "none"),
        [(2, 3, 4, 4), (2, 2, 3, 7), (4, 5, 3, 3), (4,)],  # cropped below, and repeated on both sides
    ),
    "no_skip": (
        lambda x, w, b: ops.upsample_concat_conv2d_relu(x, x.new_empty(2, 0, 5, 6), w, b, mode="nearest"),
        lambda x, w, b: reference.conv2d_relu(F.pad(F.interpolate(x, scale_factor=2.0), [0, 0, 0, 1]), w, b, 0.0),
        [(2, 3, 2, 3), (4, 3, 3, 3), (4,)],
    ),
    "unpadded_concat": (
        lambda x, s, w, b: ops.upsample_concat_conv2d_relu(x, s, w, b, padding="valid"),
        lambda x, s, w, b: F.relu(F.conv2d(reference.upsample_concat(x, s, "bilinear", True), w, b)),
        [(2, 3, 2, 3), (2, 2, 5, 6), (4, 5, 3, 3), (4,)],
    ),
    "concat_conv2d": (
        lambda x, s, w: ops.upsample_concat_conv2d_relu(x, s, w, mode="none", relu=False),
        lambda x, s, w: reference.upsample_concat_conv2d_relu(x, s, w, None, "none", False, 1.0),
        [(2, 3, 4, 6), (2, 2, 5, 6), (4, 5, 3, 3)],
    ),
    "conv_transpose2x2": (
        ops.conv_transpose2x2,
        reference.conv_transpose2x2,
        [(2, 3, 4, 3), (3, 5, 2, 2), (5,)],
    ),
    "conv_transpose_oblong": (
        ops.conv_transpose2x2,
        lambda x, w, b: F.conv_transpose2d(x, w, b, (1, 3)),
        [(2, 3, 4, 3), (3, 5, 1, 3), (5,)],
    ),
}


def outputs(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


class Names(TorchDispatchMode):
    """Which operators run within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))
