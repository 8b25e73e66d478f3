"""The U-Net in plain PyTorch: the truth, the baseline and the CPU path in one place.

``DoubleConv``, ``Down`` and ``Up`` are the blocks of the original tutorial, with the same
state_dict keys; ``UNet`` assembles them. The functionals below them are what each fused
operator of :mod:`fastunet.ops` must equal, written with nothing but torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UNetConfig

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self is new in Python 3.11

# --- functionals: what the fused operators compute -------------------------------------------


def activate_(x: Tensor, slope: float) -> Tensor:
    """Activation in place. ``slope`` for negative values: 0 is a ReLU, 1 none, between them leaky."""
    if slope == 1:
        return x
    return F.relu_(x) if slope == 0 else F.leaky_relu_(x, slope)


def conv2d_relu(x: Tensor, weight: Tensor, bias: Tensor | None, slope: float) -> Tensor:
    """Stride-1 convolution that keeps the size, then the activation.

    Shapes: x (N, C, H, W), weight (O, C, K, K) with K odd, bias (O,) -> (N, O, H, W).
    """
    return activate_(F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2), slope)


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


def upsample_concat(x: Tensor, skip: Tensor, mode: str, align_corners: bool) -> Tensor:
    """``[upsampled, skip]`` on channels. x (N, C1, h, w), skip (N, C2, H, W) -> (N, C1 + C2, H, W)."""
    x = pad_to(upsample(x, mode, align_corners), skip.shape[-2], skip.shape[-1])
    return torch.cat([x, skip], dim=1)


def upsample_concat_conv2d_relu(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mode: str,
    align_corners: bool,
    slope: float,
) -> Tensor:
    """:func:`conv2d_relu` of :func:`upsample_concat`."""
    return conv2d_relu(upsample_concat(x, skip, mode, align_corners), weight, bias, slope)


def conv_transpose2x2(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """2x2 stride-2 transposed convolution. x (N, C, H, W), weight (C, O, 2, 2) -> (N, O, 2H, 2W)."""
    return F.conv_transpose2d(x, weight, bias, stride=2)


# --- blocks ----------------------------------------------------------------------------------


class DoubleConv(nn.Module):
    """(3x3 convolution, [norm], activation) twice. (N, in_ch, H, W) -> (N, out_ch, H, W).

    ``mid_ch``: channels between the two; by default ``out_ch``.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        *,
        mid_ch: int | None = None,
        norm: str | None = None,
        activation: str = "relu",
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        mid_ch = out_ch if mid_ch is None else mid_ch
        for before, after in ((in_ch, mid_ch), (mid_ch, out_ch)):
            layers.append(nn.Conv2d(before, after, 3, padding=1))
            if norm == "batch":
                layers.append(nn.BatchNorm2d(after))
            elif norm == "instance":
                layers.append(nn.InstanceNorm2d(after, affine=True))
            leaky = activation == "leaky_relu"
            layers.append(nn.LeakyReLU(negative_slope, inplace=True) if leaky else nn.ReLU(inplace=True))
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Down(nn.Module):
    """Encoder level: double convolution, then a 2x2 max-pool.

    (N, in_ch, H, W) -> pooled (N, out_ch, H // 2, W // 2), feature (N, out_ch, H, W).
    """

    def __init__(self, in_ch: int, out_ch: int, **block: Any) -> None:
        super().__init__()
        self.conv = DoubleConv(in_ch, out_ch, **block)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.conv(x)
        return self.pool(feature), feature


class Up(nn.Module):
    """Decoder level: double the map, concatenate ``[upsampled, skip]``, double convolution.

    Args:
        in_ch: channels after the concatenation.
        out_ch: channels out.
        upsample, align_corners: as in :class:`fastunet.config.UNetConfig`.
        x_ch: channels of ``x``, needed by the learned kinds, which map it to ``up_ch``. The default
            ``in_ch`` fits widths that double from level to level.
        up_ch: channels that the learned kinds give; by default ``in_ch - out_ch``.
        mid_ch: of the double convolution.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        *,
        upsample: str = "bilinear",
        align_corners: bool = True,
        x_ch: int | None = None,
        up_ch: int | None = None,
        **block: Any,
    ) -> None:
        super().__init__()
        x_ch = in_ch if x_ch is None else x_ch
        up_ch = in_ch - out_ch if up_ch is None else up_ch
        if upsample == "bilinear":
            self.up: nn.Module = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=align_corners)
        elif upsample == "nearest":
            self.up = nn.Upsample(scale_factor=2, mode="nearest")
        elif upsample == "bilinear_conv":
            self.up = nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=align_corners),
                nn.Conv2d(x_ch, up_ch, 1),
            )
        elif upsample == "transpose":
            self.up = nn.ConvTranspose2d(x_ch, up_ch, 2, stride=2)
        else:
            raise ValueError(f"upsample: unknown kind {upsample!r}")
        self.conv = DoubleConv(in_ch, out_ch, **block)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = pad_to(self.up(x), skip.shape[-2], skip.shape[-1])
        return self.conv(torch.cat([x, skip], dim=1))


class UNet(nn.Module):
    """The whole network: encoder, bottleneck, decoder, 1x1 head.

    (N, in_channels, H, W) -> logits (N, out_channels, H, W), for any H and W of at least
    2 ** (len(features) - 1). Where a pooling drops an odd row or column, the upsampled map is
    zero-padded to its skip (:func:`pad_to`). Arguments: :class:`fastunet.config.UNetConfig`.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 2,
        features: tuple[int, ...] = (64, 128, 256, 512, 1024),
        *,
        upsample: str = "bilinear",
        align_corners: bool = True,
        norm: str | None = None,
        activation: str = "relu",
        negative_slope: float = 0.01,
        decoder_features: tuple[tuple[int, int], ...] | None = None,
    ) -> None:
        super().__init__()
        c = UNetConfig(
            in_channels,
            out_channels,
            features,
            upsample,
            align_corners,
            norm,
            activation,
            negative_slope,
            decoder_features,
        )
        self.config = c
        block: dict[str, Any] = {"norm": norm, "activation": activation, "negative_slope": negative_slope}
        widths = (c.in_channels, *c.features)
        self.downs = nn.ModuleList(Down(widths[i], widths[i + 1], **block) for i in range(c.depth))
        self.bottleneck = DoubleConv(widths[-2], widths[-1], **block)
        self.ups = nn.ModuleList(
            Up(
                c.upsampled_channels(i) + c.features[i],
                c.decoder_channels(i)[1],
                upsample=upsample,
                align_corners=align_corners,
                x_ch=c.channels_from(i + 1),
                up_ch=c.upsampled_channels(i),
                mid_ch=c.decoder_channels(i)[0],
                **block,
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
        if x.dim() != 4 or x.shape[1] != c.in_channels:
            raise ValueError(f"x: expected shape (N, {c.in_channels}, H, W), got {tuple(x.shape)}")
        bottleneck = (x.shape[2] >> c.depth) * (x.shape[3] >> c.depth)
        if min(x.shape[2], x.shape[3]) < c.minimum_size:
            raise ValueError(
                f"x: expected H and W of at least {c.minimum_size} ({c.depth} poolings), got {tuple(x.shape)}"
            )
        if c.norm == "instance" and bottleneck == 1:
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
        return self.head(x)
