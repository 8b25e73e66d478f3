"""The U-Net in plain PyTorch: the truth, the baseline and the CPU path in one place.

``DoubleConv``, ``Down`` and ``Up`` are the blocks of the original tutorial, with the same
state_dict keys; ``UNet`` assembles them. The functionals below them are what each fused
operator of :mod:`fastunet.ops` must equal, written with nothing but torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UNetConfig

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack  # new in Python 3.11's typing

    from .config import Options

# --- functionals: what the fused operators compute -------------------------------------------


def activate_(x: Tensor, slope: float) -> Tensor:
    """Activation in place. ``slope`` for negative values: 0 is a ReLU, 1 none, between them leaky."""
    if slope == 1:
        return x
    return F.relu_(x) if slope == 0 else F.leaky_relu_(x, slope)


def conv2d_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slope: float,
    stride: Sequence[int] = (1, 1),
    padding: str = "same",
) -> Tensor:
    """Convolution, then the activation. ``padding``: ``"same"``, K // 2 zeros on each side, or ``"valid"``, none.

    Shapes: x (N, C, H, W), weight (O, C, K, K) with K odd, bias (O,) -> (N, O, H, W), by default. Of a bias (2, O) the
    first row are factors of the channels' sums: a batch norm of fixed statistics.
    """
    zeros = weight.shape[-1] // 2 if padding == "same" else 0
    if bias is not None and bias.dim() == 2:
        y, dtype = F.conv2d(x, weight, None, tuple(stride), zeros), torch.promote_types(x.dtype, bias.dtype)
        factor, added = bias.to(dtype).unbind()
        # Of a GPU they are not kept: in the capture of a graph they would be the graph's.
        standard = _standard if bias.device.type == "cpu" else _standard.__wrapped__
        mean, variance = standard(len(factor), dtype, bias.device)
        # Not F.batch_norm, which in PyTorch 2.11 refuses an eps of 0.
        y = torch.batch_norm(y, factor, added, mean, variance, False, 0.0, 0.0, torch.backends.cudnn.enabled)
        return activate_(y, slope)
    return activate_(F.conv2d(x, weight, bias, tuple(stride), zeros), slope)


@lru_cache(maxsize=64)
def _standard(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Statistics that a batch norm leaves its input as it is by: mean 0 and variance 1."""
    with torch.inference_mode(False):  # they outlive the call
        return torch.zeros(channels, dtype=dtype, device=device), torch.ones(channels, dtype=dtype, device=device)


def upsample(x: Tensor, mode: str, align_corners: bool) -> Tensor:
    """Double H and W. ``mode``: ``"bilinear"``, ``"nearest"`` or ``"none"`` (x as it is)."""
    if mode == "none":
        return x
    corners = align_corners if mode == "bilinear" else None
    return F.interpolate(x, scale_factor=2, mode=mode, align_corners=corners)


def padding(from_size: tuple[int, int], to_size: tuple[int, int]) -> list[int]:
    """``F.pad``'s [left, right, top, bottom] from one (H, W) to another; the odd one right or below."""
    rows, cols = to_size[0] - from_size[0], to_size[1] - from_size[1]
    return [cols // 2, cols - cols // 2, rows // 2, rows - rows // 2]


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """Zero-pad (N, C, H, W) to ``height`` x ``width``; the odd row or column goes below or right.

    Poolings drop the last odd row and column, so an upsampled map may be one smaller than its
    skip. A map larger than its skip is cropped instead.
    """
    pad = padding((x.shape[-2], x.shape[-1]), (height, width))
    return F.pad(x, pad) if any(pad) else x


def center_crop(x: Tensor, height: int, width: int) -> Tensor:
    """The middle of x (N, C, H, W), a view; the odd row or column to cut is the last."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def fit(x: Tensor, skip: Tensor, match: str) -> tuple[Tensor, Tensor]:
    """Bring an upsampled map and its skip to one size: that of the skip, or with ``"center_crop"`` the map's.

    ``match``: as in :class:`fastunet.config.UNetConfig`.
    """
    (h, w), (height, width) = x.shape[-2:], skip.shape[-2:]
    if match == "center_crop":
        return x, center_crop(skip, h, w)
    if match == "replicate_pad":
        pad = padding((h, w), (height, width))
        return (F.pad(x, pad, mode="replicate") if any(pad) else x), skip
    return pad_to(x, height, width), skip


def upsample_concat(x: Tensor, skip: Tensor, mode: str, align_corners: bool) -> Tensor:
    """``[upsampled, skip]`` on channels. x (N, C1, h, w), skip (N, C2, H, W), C2 maybe 0 -> (N, C1 + C2, H, W)."""
    x = pad_to(upsample(x, mode, align_corners), skip.shape[-2], skip.shape[-1])
    return torch.cat([x, skip], dim=1) if skip.shape[1] else x


def upsample_concat_conv2d_relu(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mode: str,
    align_corners: bool,
    slope: float,
    padding: str = "same",
) -> Tensor:
    """:func:`conv2d_relu` of :func:`upsample_concat`."""
    return conv2d_relu(upsample_concat(x, skip, mode, align_corners), weight, bias, slope, padding=padding)


def batch_norm_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    slope: float,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> Tensor:
    """Batch norm with these statistics, by default those of x (N, C, H, W) itself, then the activation."""
    return activate_(F.batch_norm(x, mean, variance, weight, bias, mean is None, 0.0, eps), slope)


def instance_norm_relu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float) -> Tensor:
    """Instance norm, each image of x (N, C, H, W) by its own statistics, then the activation."""
    return activate_(F.instance_norm(x, None, None, weight, bias, True, 0.0, eps), slope)


def conv_transpose2x2(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Transposed convolution of a stride as its filter. x (N, C, H, W), weight (C, O, 2, 2) -> (N, O, 2H, 2W)."""
    return F.conv_transpose2d(x, weight, bias, tuple(weight.shape[2:]))


# --- blocks ----------------------------------------------------------------------------------


class DoubleConv(nn.Module):
    """(3x3 convolution, [norm], activation) twice. (N, in_ch, H, W) -> (N, out_ch, H, W).

    Args:
        mid_ch: channels between them; by default ``out_ch``.
        convs: how many, where not two.
        stride: of the first.
        norm, activation, negative_slope, order, padding, norm_eps, norm_momentum: as in
            :class:`fastunet.config.UNetConfig`. bias: its ``conv_bias``.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        *,
        mid_ch: int | None = None,
        convs: int = 2,
        stride: tuple[int, int] = (1, 1),
        **unit: Any,
    ) -> None:
        super().__init__()
        widths = [in_ch, *[out_ch if mid_ch is None else mid_ch] * (convs - 1), out_ch]
        layers: list[nn.Module] = []
        for index in range(convs):
            layers += conv_unit(widths[index], widths[index + 1], stride=(1, 1) if index else stride, **unit)
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class InstanceNorm2d(nn.InstanceNorm2d):
    """PyTorch's, whose gradient (2.13, on a CPU) is wrong where that of one image's output comes in channels_last."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y.flatten().view(y.shape)  # through which gradients go in NCHW


def conv_unit(
    in_ch: int,
    out_ch: int,
    *,
    stride: tuple[int, int] = (1, 1),
    norm: str | None = None,
    activation: str = "relu",
    negative_slope: float = 0.01,
    order: str = "conv_norm_act",
    bias: bool = True,
    padding: str = "same",
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.1,
) -> list[nn.Module]:
    """A 3x3 convolution, its norm if any, and its activation, in the order in which they run."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_ch, out_ch, 3, stride=stride, padding=1 if padding == "same" else 0, bias=bias),
        nn.LeakyReLU(negative_slope, inplace=True) if activation == "leaky_relu" else nn.ReLU(inplace=True),
    ]
    if norm is not None:
        kind = nn.BatchNorm2d if norm == "batch" else InstanceNorm2d
        place = 1 if order == "conv_norm_act" else 2
        layers.insert(place, kind(out_ch, eps=norm_eps, momentum=norm_momentum, affine=True))
    return layers


class Down(nn.Module):
    """Encoder level: double convolution, then a 2x2 max-pool.

    (N, in_ch, H, W) -> pooled (N, out_ch, H // 2, W // 2), feature (N, out_ch, H, W).

    ``pool``: (rows, columns) of the max-pool; None leaves the map as it is, for a level whose
    successor starts with a strided convolution. ``block``: of :class:`DoubleConv`.
    """

    def __init__(self, in_ch: int, out_ch: int, *, pool: tuple[int, int] | None = (2, 2), **block: Any) -> None:
        super().__init__()
        self.conv = DoubleConv(in_ch, out_ch, **block)
        self.pool = nn.Identity() if pool is None else nn.MaxPool2d(pool)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.conv(x)
        return self.pool(feature), feature


class Up(nn.Module):
    """Decoder level: double the map, concatenate ``[upsampled, skip]``, double convolution.

    Args:
        in_ch: channels after the concatenation.
        out_ch: channels out.
        upsample, align_corners, concat, match: as in :class:`fastunet.config.UNetConfig`.
        x_ch: channels of ``x``, needed by the learned kinds, which map it to ``up_ch``. The default
            ``in_ch`` fits widths that double from level to level.
        up_ch: channels that the learned kinds give; by default ``in_ch - out_ch``.
        stride: (rows, columns) by which ``"transpose"`` enlarges the map.
        mid_ch, convs: of the double convolution.
        unit: of :func:`conv_unit`, for every 3x3 convolution.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        *,
        upsample: str = "bilinear",
        align_corners: bool = True,
        concat: str = "upsampled_first",
        match: str = "zero_pad",
        x_ch: int | None = None,
        up_ch: int | None = None,
        stride: tuple[int, int] = (2, 2),
        mid_ch: int | None = None,
        convs: int = 2,
        **unit: Any,
    ) -> None:
        super().__init__()
        x_ch = in_ch if x_ch is None else x_ch
        up_ch = in_ch - out_ch if up_ch is None else up_ch
        self.kind, self.concat, self.match = upsample, concat, match
        corners = align_corners if upsample.startswith("bilinear") else None
        interpolate = nn.Upsample(scale_factor=2, mode=upsample.removesuffix("_conv"), align_corners=corners)
        if upsample in ("bilinear", "nearest"):
            self.up: nn.Module = interpolate
        elif upsample == "bilinear_conv":
            self.up = nn.Sequential(interpolate, nn.Conv2d(x_ch, up_ch, 1))
        elif upsample == "nearest_conv":
            self.up = nn.Sequential(interpolate, *conv_unit(x_ch, up_ch, **{**unit, "padding": "same"}))
        elif upsample == "transpose":
            self.up = nn.ConvTranspose2d(x_ch, up_ch, stride, stride=stride)
        else:
            raise ValueError(f"upsample: unknown kind {upsample!r}")
        self.conv = DoubleConv(in_ch, out_ch, mid_ch=mid_ch, convs=convs, **unit)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x, skip = fit(self.up(x), skip, self.match)
        return self.conv(torch.cat([x, skip] if self.concat == "upsampled_first" else [skip, x], dim=1))


class UNet(nn.Module):
    """The whole network: encoder, bottleneck, decoder, 1x1 head.

    (N, in_channels, H, W) -> logits (N, out_channels, H, W), for any H and W of at least
    ``config.minimum_size``. Where a pooling drops an odd row or column, the upsampled map is
    zero-padded to its skip (:func:`pad_to`). The options are those of
    :class:`fastunet.config.UNetConfig`; ``match="center_crop"`` makes the output smaller,
    ``downsample="stride"`` takes only sizes that its steps divide.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 2,
        features: tuple[int, ...] = (64, 128, 256, 512, 1024),
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        c = self.config = UNetConfig(in_channels, out_channels, features, **options)
        unit: dict[str, Any] = {
            name: getattr(c, name)
            for name in ("norm", "activation", "negative_slope", "order", "padding", "norm_eps", "norm_momentum")
        }
        unit["bias"] = c.conv_bias
        strided = c.downsample == "stride"
        widths = (c.in_channels, *c.features)
        levels = [
            {"convs": c.convs_down(i), "stride": c.stride(i) if strided and i else (1, 1), **unit}
            for i in range(c.depth + 1)
        ]
        self.downs = nn.ModuleList(
            Down(widths[i], widths[i + 1], pool=None if strided else c.stride(i + 1), **levels[i])
            for i in range(c.depth)
        )
        self.bottleneck = DoubleConv(widths[-2], widths[-1], **levels[-1])
        self.ups = nn.ModuleList(
            Up(
                c.upsampled_channels(i) + c.features[i],
                c.decoder_channels(i)[1],
                upsample=c.upsampling(i),
                align_corners=c.align_corners,
                concat=c.concat,
                match=c.match,
                x_ch=c.channels_from(i + 1),
                up_ch=c.upsampled_channels(i),
                stride=c.stride(i + 1),
                mid_ch=c.decoder_channels(i)[0],
                convs=c.convs_up(i),
                **unit,
            )
            for i in reversed(range(c.depth))
        )
        self.head = nn.Conv2d(c.channels_from(0), c.out_channels, 1)

    @classmethod
    def from_config(cls, config: UNetConfig) -> Self:
        """Build the network that ``config`` describes, with fresh weights."""
        return cls(**vars(config))

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError, naming what was expected, unless ``x`` can go through the network."""
        c = self.config
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: expected a tensor of floating-point numbers, got {got}")
        if x.dim() != 4 or x.shape[1] != c.in_channels:
            raise ValueError(f"x: expected shape (N, {c.in_channels}, H, W), got {tuple(x.shape)}")
        if min(x.shape[2], x.shape[3]) < c.minimum_size:
            raise ValueError(
                f"x: expected H and W of at least {c.minimum_size} ({c.depth} poolings), got {tuple(x.shape)}"
            )
        rows, cols = c.reductions
        if c.downsample == "stride" and (x.shape[2] % rows or x.shape[3] % cols):
            # A stride rounds a map's size up; the decoder's, doubled, would be larger than its skip.
            raise ValueError(f"x: expected H divisible by {rows} and W by {cols}, got {tuple(x.shape)}")
        if c.norm == "instance" and c.sides(x.shape[2], 0)[0][-1] * c.sides(x.shape[3], 1)[0][-1] == 1:
            raise ValueError(f"x: instance norm needs more than one pixel at the bottleneck, got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        skips = []
        for down in self.downs:
            x, skip = down(x)
            skips.append(skip)
        x = self.bottleneck(x)
        for up in self.ups:
            x = up(x, skips.pop())
        return self.finish(self.head(x))

    def finish(self, logits: Tensor) -> Tensor:
        """The final activation, where there is one."""
        return torch.sigmoid(logits) if self.config.final_activation == "sigmoid" else logits
