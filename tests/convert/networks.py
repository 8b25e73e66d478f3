"""Networks of the families, to convert from: written for these tests from what is publicly known of each.

Structure and names of modules are those of the originals; the code is ours. MONAI's and nnU-Net's
come from their packages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convs(channels: Sequence[int], *, bias: bool = True, norm: bool = True, act_first: bool = False, pad: int = 1):
    """A 3x3 convolution, batch norm and ReLU for each step from one number of channels to the next."""
    layers: list[nn.Module] = []
    for before, after in zip(channels[:-1], channels[1:], strict=True):
        last: list[nn.Module] = [nn.BatchNorm2d(after)] if norm else []
        last.insert(0 if act_first else len(last), nn.ReLU(inplace=True))
        layers += [nn.Conv2d(before, after, 3, padding=pad, bias=bias), *last]
    return nn.Sequential(*layers)


def holder(**modules: nn.Module) -> nn.Module:
    """A module with children and no function of its own."""
    module = nn.Module()
    for name, child in modules.items():
        module.add_module(name, child)
    return module


# --- the tutorial's blocks -------------------------------------------------------------------


class DoubleConv(nn.Module):
    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(in_ch, out_ch, 3, padding=1), nn.ReLU(), nn.Conv2d(out_ch, out_ch, 3, padding=1), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Down(nn.Module):
    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        self.conv = DoubleConv(in_ch, out_ch)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.conv(x)
        return self.pool(feature), feature


class Up(nn.Module):
    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv = DoubleConv(in_ch, out_ch)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([self.up(x), skip], dim=1))


class Assembled(nn.Module):
    """Two levels, under names of somebody's choice; the decoder is registered from full resolution."""

    def __init__(self, in_ch: int = 2, out_ch: int = 3, widths: Sequence[int] = (4, 6, 9, 7, 5)) -> None:
        super().__init__()
        a, b, c, d, e = widths
        self.enc1, self.enc2 = Down(in_ch, a), Down(a, b)
        self.dec1, self.dec2 = Up(d + a, e), Up(c + b, d)
        self.middle = DoubleConv(b, c)
        self.classify = nn.Conv2d(e, out_ch, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, a = self.enc1(x)
        x, b = self.enc2(x)
        return self.classify(self.dec1(self.dec2(self.middle(x), b), a))


class Tutorial(nn.Module):
    """Two levels under the names that a FastUNet's own modules have; or the bottleneck's under another."""

    def __init__(self, bottleneck: str = "bottleneck") -> None:
        super().__init__()
        self.downs = nn.ModuleList([Down(1, 4), Down(4, 8)])
        self.name = bottleneck
        self.add_module(bottleneck, DoubleConv(8, 16))
        self.ups = nn.ModuleList([Up(16 + 8, 8), Up(8 + 4, 4)])
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, a = self.downs[0](x)
        x, b = self.downs[1](x)
        x = self.ups[0](self.get_submodule(self.name)(x), b)
        return self.head(self.ups[1](x, a))


class Listed(nn.Module):
    """Four levels in lists; the last Down's pooled map is left aside, so that it is the bottleneck."""

    def __init__(self, features: Sequence[int] = (2, 3, 4, 5, 6)) -> None:
        super().__init__()
        widths = [1, *features]
        self.contract = nn.ModuleList(Down(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.expand = nn.ModuleList(Up(widths[i + 1] + widths[i], widths[i]) for i in range(len(features) - 1, 0, -1))
        self.out = nn.Conv2d(features[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.contract:
            x, skip = down(x)
            skips.append(skip)
        x = skips.pop()
        for up in self.expand:
            x = up(x, skips.pop())
        return self.out(x)


# --- milesial --------------------------------------------------------------------------------


class Milesial(nn.Module):
    """``bias``: as before December 2021."""

    def __init__(
        self, in_ch: int = 3, out_ch: int = 2, width: int = 4, *, bilinear: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        f = [width * 2**i for i in range(5)]
        f[-1] //= 2 if bilinear else 1
        self.inc = holder(double_conv=convs([in_ch, f[0], f[0]], bias=bias))
        for i in range(1, 5):
            down = holder(double_conv=convs([f[i - 1], f[i], f[i]], bias=bias))
            self.add_module(f"down{i}", holder(maxpool_conv=nn.Sequential(nn.MaxPool2d(2), down)))
        arriving = f[4]
        for i in range(1, 5):
            skip = f[4 - i]
            if bilinear:
                up: nn.Module = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
                both = arriving + skip
                out = skip // (2 if i < 4 else 1)
                block = convs([both, both // 2, out], bias=bias)
            else:
                up, out = nn.ConvTranspose2d(arriving, arriving // 2, 2, stride=2), skip
                block = convs([arriving // 2 + skip, out, out], bias=bias)
            self.add_module(f"up{i}", holder(up=up, conv=holder(double_conv=block)))
            arriving = out
        self.outc = holder(conv=nn.Conv2d(arriving, out_ch, 1))

    def forward(self, x: Tensor) -> Tensor:
        m: Any = self
        skips = [m.inc.double_conv(x)]
        for i in range(1, 5):
            pool, down = getattr(m, f"down{i}").maxpool_conv
            skips.append(down.double_conv(pool(skips[-1])))
        x = skips.pop()
        for i in range(1, 5):
            up, skip = getattr(m, f"up{i}"), skips.pop()
            x = up.up(x)
            dy, dx = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
            x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
            x = up.conv.double_conv(torch.cat([skip, x], 1))
        return m.outc.conv(x)


# --- mateuszbuda -----------------------------------------------------------------------------


class Mateuszbuda(nn.Module):
    def __init__(self, in_ch: int = 3, out_ch: int = 1, width: int = 4) -> None:
        super().__init__()
        f = [width * 2**i for i in range(5)]

        def block(name: str, before: int, after: int) -> nn.Module:
            stages = convs([before, after, after], bias=False)
            names = ("conv1", "norm1", "relu1", "conv2", "norm2", "relu2")
            named = nn.Sequential()
            for suffix, layer in zip(names, stages, strict=True):
                named.add_module(name + suffix, layer)
            return named

        for i in range(1, 5):
            self.add_module(f"encoder{i}", block(f"enc{i}", in_ch if i == 1 else f[i - 2], f[i - 1]))
            self.add_module(f"pool{i}", nn.MaxPool2d(2, 2))
        self.bottleneck = block("bottleneck", f[3], f[4])
        for i in range(4, 0, -1):
            self.add_module(f"upconv{i}", nn.ConvTranspose2d(f[i], f[i - 1], 2, stride=2))
            self.add_module(f"decoder{i}", block(f"dec{i}", 2 * f[i - 1], f[i - 1]))
        self.conv = nn.Conv2d(f[0], out_ch, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i in range(1, 5):
            skips.append(getattr(self, f"encoder{i}")(x))
            x = getattr(self, f"pool{i}")(skips[-1])
        x = self.bottleneck(x)
        for i in range(4, 0, -1):
            x = torch.cat((getattr(self, f"upconv{i}")(x), skips.pop()), dim=1)
            x = getattr(self, f"decoder{i}")(x)
        return torch.sigmoid(self.conv(x))


# --- jvanvugt --------------------------------------------------------------------------------


class Jvanvugt(nn.Module):
    def __init__(
        self,
        in_ch: int = 1,
        out_ch: int = 2,
        depth: int = 3,
        width: int = 4,
        *,
        padding: bool = False,
        batch_norm: bool = False,
        upconv: bool = True,
    ) -> None:
        super().__init__()

        def block(before: int, after: int) -> nn.Module:
            return convs([before, after, after], norm=batch_norm, act_first=True, pad=int(padding))

        f = [width * 2**i for i in range(depth)]
        self.down_path = nn.ModuleList(holder(block=block(in_ch if i == 0 else f[i - 1], f[i])) for i in range(depth))
        self.up_path = nn.ModuleList()
        for i in range(depth - 2, -1, -1):
            if upconv:
                up: nn.Module = nn.ConvTranspose2d(f[i + 1], f[i], 2, stride=2)
            else:
                up = nn.Sequential(nn.Upsample(mode="bilinear", scale_factor=2), nn.Conv2d(f[i + 1], f[i], 1))
            self.up_path.append(holder(up=up, conv_block=holder(block=block(2 * f[i], f[i]))))
        self.last = nn.Conv2d(f[0], out_ch, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, down in enumerate(self.down_path):
            x = F.max_pool2d(x, 2) if i else x
            x = down.block(x)  # type: ignore[operator]
            skips.append(x)
        skips.pop()
        for up in self.up_path:
            x, skip = up.up(x), skips.pop()  # type: ignore[operator]
            top, left = (skip.shape[2] - x.shape[2]) // 2, (skip.shape[3] - x.shape[3]) // 2
            skip = skip[:, :, top : top + x.shape[2], left : left + x.shape[3]]
            x = up.conv_block.block(torch.cat([x, skip], 1))  # type: ignore[operator,union-attr]
        return self.last(x)


# --- LeeJunHyun ------------------------------------------------------------------------------


class LeeJunHyun(nn.Module):
    def __init__(self, in_ch: int = 3, out_ch: int = 1, width: int = 4) -> None:
        super().__init__()
        f = [width * 2**i for i in range(5)]
        for i in range(1, 6):
            self.add_module(f"Conv{i}", holder(conv=convs([in_ch if i == 1 else f[i - 2], f[i - 1], f[i - 1]])))
        for i in range(5, 1, -1):
            up = nn.Sequential(nn.Upsample(scale_factor=2), *convs([f[i - 1], f[i - 2]]))
            self.add_module(f"Up{i}", holder(up=up))
            self.add_module(f"Up_conv{i}", holder(conv=convs([f[i - 1], f[i - 2], f[i - 2]])))
        self.Conv_1x1 = nn.Conv2d(f[0], out_ch, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i in range(1, 6):
            x = F.max_pool2d(x, 2) if i > 1 else x
            x = getattr(self, f"Conv{i}").conv(x)
            skips.append(x)
        skips.pop()
        for i in range(5, 1, -1):
            x = torch.cat((skips.pop(), getattr(self, f"Up{i}").up(x)), dim=1)
            x = getattr(self, f"Up_conv{i}").conv(x)
        return self.Conv_1x1(x)
