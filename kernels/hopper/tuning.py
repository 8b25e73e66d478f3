"""Launch configurations of the Hopper kernels, and what TMA asks of a tensor.

None has been timed: the numbers are argued in benchmarks/NOTES.md and checked by ahead-of-time
compilation. Which layers take these kernels at all is for a measured table to say (fastunet.dispatch).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tuning import FUSION, power_of_2, remembered
from .compat import OVERLAPPING_WINDOWS

SHARED_MEMORY = 227 * 1024  # bytes a block can have on sm_90
_RESERVED = 1024  # of it, for barriers, the state of warp specialisation, alignment
TUNED_SIZES = ((1, 256, 256), (16, 256, 256), (8, 512, 512))  # (N, H, W) that benchmarks/hopper.py makes a table for
PARITY_SIZE = (2, 131, 197)  # and one of odd numbers, at which every configuration is checked
_MULTIPROCESSORS = 132  # H100 SXM and H200; counted on the device where there is one


@dataclass(frozen=True)
class HopperConfig:
    """Tile of block_co output channels x (block_n x block_h x block_w) pixels, and its rings.

    Attributes:
        block_co: 128, shared by both warpgroups, or 64, which they take in turns.
        halo: load two rows more than the tile has, and read them shifted.
        splits: shares of the K loop, each a tile of its own, summed afterwards in a fixed order.
    """

    block_co: int
    block_n: int
    block_h: int
    block_w: int
    halo: bool
    x_stages: int
    w_stages: int
    splits: int = 1

    def __str__(self) -> str:
        tile = f"hopper {self.block_co} x ({self.block_n}, {self.block_h}, {self.block_w})"
        kind = f"{'halo, ' if self.halo else ''}{self.x_stages} + {self.w_stages} stages"
        return f"{tile}, {kind}" + (f", {self.splits} splits" if self.splits > 1 else "")

    def tiles(self, n: int, h: int, w: int, out_channels: int) -> int:
        """How many tiles cover ``n`` maps of ``h`` x ``w`` pixels and ``out_channels`` channels."""
        blocks = ((n, self.block_n), (h, self.block_h), (w, self.block_w), (out_channels, self.block_co))
        return self.splits * math.prod(-(-size // block) for size, block in blocks)

    def options(self) -> dict[str, int | bool]:
        """The keyword arguments of a launch."""
        return {
            "BLOCK_CO": self.block_co,
            "BLOCK_N": self.block_n,
            "BLOCK_H": self.block_h,
            "BLOCK_W": self.block_w,
            "HALO": self.halo,
            "X_STAGES": self.x_stages,
            "W_STAGES": self.w_stages,
            "SPLITS": self.splits,
            **FUSION,
        }


def block_k(dtype: torch.dtype) -> int:
    """Channels a step: 128 bytes, one row of the widest swizzle."""
    return 128 // dtype.itemsize


def multiprocessors(device: torch.device) -> int:
    """How many there are: as many programs run, each tile after tile."""
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _config(
    block_co: int,
    pixels: int,
    height: int,
    width: int,
    *,
    ksize: int,
    pool: bool,
    out_itemsize: int,
    splits: int = 1,
) -> HopperConfig:
    """Fill the shared memory with stages."""
    block_w = power_of_2(width, 2, 16)
    block_h = power_of_2(height, 2, min(16, pixels // block_w))
    block_n = pixels // (block_w * block_h)
    halo = OVERLAPPING_WINDOWS and ksize == 3 and block_n == 1 and block_w >= 8
    out = 2 * pixels * 64 * (4 if splits > 1 else out_itemsize)
    left = SHARED_MEMORY - _RESERVED - out - (out // 4 if pool and splits == 1 else 0)
    x_bytes, w_bytes = (pixels + 2 * block_w * halo) * 128, block_co * 128
    if halo:  # three products a box: two boxes are six products deep
        x_stages = 2 if pixels == 256 else 3
        w_stages = min(3 * x_stages, (left - x_stages * x_bytes) // w_bytes)
    else:
        x_stages = w_stages = min(6, left // (x_bytes + w_bytes))
    return HopperConfig(block_co, block_n, block_h, block_w, halo, x_stages, w_stages, splits)


@remembered
def hopper_configs(
    channels: tuple[int, ...],
    out_channels: int,
    n: int,
    h: int,
    w: int,
    dtype: torch.dtype,
    *,
    ksize: int,
    pool: bool,
    head: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[HopperConfig, ...]:
    """Every configuration worth timing for a layer, the one argued to be best first.

    Args:
        channels: input channels of each source. n, h, w: images and size of the map.
        head: whether a 1x1 head follows in the same pass; a K loop that is split has none.
        out_dtype: of the result; ``dtype`` by default.
    """
    out_itemsize = (out_dtype or dtype).itemsize
    # 256 pixels of float32 would leave no room for stages beside the result.
    most = 256 if out_itemsize == 2 else 128
    options = {"ksize": ksize, "pool": pool, "out_itemsize": out_itemsize}
    widths = (64,) if out_channels <= 64 else (128, 64)
    tile = [(co, pixels) for pixels in (most, 128) for co in widths]
    plain = [_config(co, pixels, h, w, **options) for co, pixels in dict.fromkeys(tile)]
    # Fewer tiles than multiprocessors: smaller ones first, then shares of the K loop.
    plain.sort(key=lambda config: config.tiles(n, h, w, out_channels) < _MULTIPROCESSORS)
    if head:
        return tuple(dict.fromkeys(plain))
    blocks = sum(-(-c // block_k(dtype)) for c in channels)
    small = _config(widths[0], 128, h, w, **options)
    tiles = small.tiles(n, h, w, out_channels)
    shares = [s for s in (8, 4, 2) if blocks % s == 0 and blocks >= 2 * s and tiles * s <= 2 * _MULTIPROCESSORS]
    split = [_config(widths[0], 128, h, w, **options, splits=s) for s in shares]
    # A split pays for a pass over its shares; it is tried first where not even half the chip works.
    ordered = [*split, *plain] if 2 * tiles <= _MULTIPROCESSORS else [*plain, *split]
    return tuple(dict.fromkeys(ordered))


def transpose_configs(
    channels: tuple[int, ...], out_channels: int, n: int, h: int, w: int, dtype: torch.dtype
) -> tuple[HopperConfig, ...]:
    """:func:`hopper_configs` of a 2x2 stride-2 transposed convolution of maps of ``h`` x ``w``.

    A filter has two rows, whose tiles are apart, and two columns, which are channels.
    """
    found = hopper_configs(channels, 2 * out_channels, 2 * n, h, w, dtype, ksize=1, pool=False)
    return tuple(config for config in found if config.splits == 1)


def why_not(
    channels: tuple[int, ...], out_channels: int, dtype: torch.dtype, *, tf32: bool, padding: tuple[int, int] = (0, 0)
) -> str | None:
    """Why these kernels cannot serve a layer, on a Hopper GPU; None if they can.

    Args:
        channels: input channels of each source.
        padding: rows above and columns left of the first source, less than 0 where it is cropped.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{str(dtype).removeprefix('torch.')} is not a Hopper kernel's dtype"
    if dtype == torch.float32 and not tf32:
        return "float32 without tf32 has no WGMMA"
    step = 16 // dtype.itemsize
    if any(c % step for c in (*channels, out_channels)):
        return f"TMA wants channels in multiples of {step}, not {channels} to {out_channels}"
    if min(padding) < 0:
        return "the upsampled map is larger than the skip; TMA pads and cannot crop"
    return None


def layer_configs(
    op: str,
    maps: tuple[tuple[int, ...], ...],
    weight: tuple[int, ...],
    dtype: torch.dtype,
    *,
    mode: str = "none",
    tf32: bool = True,
) -> tuple[HopperConfig, ...]:
    """:func:`hopper_configs` of a fused operator of :mod:`fastunet.ops`; empty where :func:`why_not_layer` says why."""
    if why_not_layer(op, maps, weight, dtype, mode=mode, tf32=tf32) is not None:
        return ()
    n, _, h, w = maps[-1]
    channels = tuple(shape[1] for shape in maps)
    if op == "conv_transpose2x2":
        return transpose_configs(channels, weight[1], n, h, w, dtype)
    pool = op == "conv2d_relu_pool"
    head = op == "conv2d_relu_head"
    return hopper_configs(channels, weight[0], n, h, w, dtype, ksize=weight[-1], pool=pool, head=head)


def why_not_layer(
    op: str,
    maps: tuple[tuple[int, ...], ...],
    weight: tuple[int, ...],
    dtype: torch.dtype,
    *,
    mode: str = "none",
    tf32: bool = True,
) -> str | None:
    """:func:`why_not` of a fused operator of :mod:`fastunet.ops`.

    Args:
        maps: shape (N, C, H, W) of each source; of x before it is upsampled. weight: its shape.
    """
    if op == "conv_transpose2x2" and weight[2:] != (2, 2):
        return "the only stride here is 2x2, not {}x{}".format(*weight[2:])
    padding = (0, 0)
    if len(maps) == 2 and mode == "none":
        padding = (maps[1][2] - maps[0][2]) // 2, (maps[1][3] - maps[0][3]) // 2
    out_channels = weight[1] if op == "conv_transpose2x2" else weight[0]
    return why_not(tuple(shape[1] for shape in maps), out_channels, dtype, tf32=tf32, padding=padding)


def why_not_dgrad(
    op: str, maps: tuple[tuple[int, ...], ...], weight: tuple[int, ...], dtype: torch.dtype, *, tf32: bool = True
) -> str | None:
    """:func:`why_not` of the gradients of a fused operator's sources, each a convolution of its own; of the first."""
    if op == "conv_transpose2x2":
        return "it gives no gradient of a transposed convolution's input"
    obstacles = (why_not((weight[0],), shape[1], dtype, tf32=tf32) for shape in maps)
    return next((obstacle for obstacle in obstacles if obstacle is not None), None)


def tma_ready(x: Tensor) -> Tensor:
    """``x`` (N, C, H, W) with a base and strides that TMA takes; copied only if need be."""
    strides = (x.stride(0), x.stride(2), x.stride(3))
    if x.stride(1) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in strides):
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).copy_(x)
