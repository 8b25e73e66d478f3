"""Launch configurations: frozen, chosen by shape before the launch, each with its reason.

The numbers are argued from the tile arithmetic and checked by ahead-of-time compilation (no
spills, shared memory that fits); what a GPU has not confirmed is listed in benchmarks/PENDING.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

HOPPER = (9, 0)
HEAD_CLASSES, HEAD_CHANNELS = 16, 64  # at most, of a 1x1 head behind a convolution whose tiles hold all its channels
# Of every launch: products and sums as one instruction. Left out, Triton does that up to 3.9, which warns, but no more.
FUSION = {"enable_fp_fusion": True}
remembered = functools.lru_cache(maxsize=4096)  # what each launch asks for by its shapes
LARGE_SHARED_MEMORY = (9, 10)  # majors of the data-centre GPUs with TMA and 227 KB; 12.x has 99 KB


@dataclass(frozen=True)
class ConvConfig:
    """Tile of an implicit GEMM: block_co output channels x (block_n x block_h x block_w) pixels."""

    block_co: int
    block_n: int
    block_h: int
    block_w: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False

    def __str__(self) -> str:
        tile = f"{self.block_co} x ({self.block_n}, {self.block_h}, {self.block_w}) x {self.block_k}"
        return f"{tile}, {self.num_warps} warps, {self.num_stages} stages, {'TMA' if self.tma else 'pointers'}"

    def tiles(self, n: int, h: int, w: int, out_channels: int) -> int:
        """How many tiles cover ``n`` maps of ``h`` x ``w`` pixels and ``out_channels`` channels."""
        blocks = ((n, self.block_n), (h, self.block_h), (w, self.block_w), (out_channels, self.block_co))
        return math.prod(-(-size // block) for size, block in blocks)

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            "BLOCK_CO": self.block_co,
            "BLOCK_N": self.block_n,
            "BLOCK_H": self.block_h,
            "BLOCK_W": self.block_w,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **FUSION,
        }


@dataclass(frozen=True)
class PointwiseConfig:
    """Tile of a memory-bound kernel: block_p pixels x block_c channels."""

    block_p: int
    block_c: int
    num_warps: int

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {"BLOCK_P": self.block_p, "BLOCK_C": self.block_c, "num_warps": self.num_warps, **FUSION}


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; a device without one (the interpreter's CPU) takes the newest path."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else HOPPER


def power_of_2(value: int, low: int, high: int) -> int:
    """The smallest power of 2 that is at least ``value``, kept within [low, high]."""
    return max(low, min(high, 1 << (value - 1).bit_length()))


def _tile(pixels: int, height: int, width: int) -> tuple[int, int, int]:
    """(block_n, block_h, block_w): as square as the map allows, several images where it is small.

    Square tiles re-read the least border: 10 x 18 for 8 x 16 pixels is 1.4x, 3 x 130 would be 3x.
    Rows and columns come in pairs, for the pool.
    """
    block_w = power_of_2(width, 2, min(16, pixels // 2))
    block_h = power_of_2(height, 2, min(16, pixels // block_w))
    return pixels // (block_w * block_h), block_h, block_w


@remembered
def conv_config(
    channels: tuple[int, ...],
    out_channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    precise: bool = False,
    tma: bool = False,
    interpolating: bool = False,
    whole: bool = False,
) -> ConvConfig:
    """Tile for a convolution.

    Args:
        channels: input channels of each source.
        precise: float32 without tf32, on the plain cores.
        tma: every tensor can be addressed by a TMA descriptor.
        interpolating: a source is upsampled on the way to the product.
        whole: the tile is to hold all output channels, at most ``HEAD_CHANNELS``, and none is upsampled.
    """
    size = 4 if dtype == torch.float32 else 2
    # 128 bytes of channels a step: one swizzled row of shared memory, one full cache line. Less,
    # if that divides every source evenly and still feeds an MMA: no masked tail, and TMA serves.
    common = math.gcd(*channels)
    divisor = common & -common
    block_k = min(divisor, 128 // size) if divisor >= 16 else power_of_2(min(channels), 16, 128 // size)
    # 16 rows for a head of few classes: it is memory-bound, so padding the product costs nothing.
    block_co = power_of_2(out_channels, 16, 128)
    if precise:
        # Operands and accumulators of plain multiply-adds all live in registers: 32 x 32 spills nothing.
        # And so do those of 64 x 16.
        block_co = min(block_co, 64 if whole else 32)
        return ConvConfig(block_co, *_tile(1024 // max(32, block_co), height, width), 16, num_warps=4, num_stages=2)
    if interpolating:
        # Four neighbours, their weights and the sum live beside the accumulators.
        return ConvConfig(min(block_co, 64), *_tile(64, height, width), min(block_k, 32), num_warps=4, num_stages=2)
    large = capability[0] in LARGE_SHARED_MEMORY
    use_tma = tma and large and block_co >= 64 and all(c % block_k == 0 for c in channels)
    # 64 output channels: twice the pixels, so that the accumulator stays 128 registers a thread.
    # Without TMA the pixels' addresses want those registers, in float32 twice as many.
    pixels = 256 if block_co == 64 and use_tma else 128
    if size == 4 and not use_tma:
        block_co = min(block_co, 64)
    # 96 KB of stages fit sm_86, sm_89 and sm_120 too (99 KB).
    stages = 4 if large else 3
    return ConvConfig(block_co, *_tile(pixels, height, width), block_k, num_warps=8, num_stages=stages, tma=use_tma)


def conv_configs(
    channels: tuple[int, ...],
    out_channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    precise: bool = False,
    interpolating: bool = False,
    whole: bool = False,
    tma: bool = True,
) -> tuple[ConvConfig, ...]:
    """Every tile that :func:`conv_config` may give for such a layer on such a device, wherever its tensors lie.

    Args:
        tma: whether it may be addressed by TMA at all.
    """
    shape = channels, out_channels, height, width, dtype, capability
    options = {"precise": precise, "interpolating": interpolating, "whole": whole}
    tiles = (conv_config(*shape, tma=boxes, **options) for boxes in ((True, False) if tma else (False,)))
    return tuple(dict.fromkeys(tiles))


@remembered
def stem_config(channels: int, out_channels: int, height: int, width: int, *, precise: bool = False) -> ConvConfig:
    """Tile for 1 to 4 input channels: memory-bound on its output, one short product a tile."""
    block_k = power_of_2(9 * channels, 16, 64)
    if precise:  # as in conv_config: 64 x 128 spills at 64 products a pixel
        return ConvConfig(
            power_of_2(out_channels, 16, 32), *_tile(32, height, width), block_k, num_warps=4, num_stages=1
        )
    return ConvConfig(power_of_2(out_channels, 16, 64), *_tile(128, height, width), block_k, num_warps=4, num_stages=1)


@remembered
def pointwise_config(channels: int, dtype: torch.dtype) -> PointwiseConfig:
    """Tile for a pass over memory: 16 bytes a thread and access, 32 elements a thread in all."""
    block_c = power_of_2(channels, 1, 64)
    return PointwiseConfig(block_p=max(1, 4096 // block_c), block_c=block_c, num_warps=4)


# Programs that share a reduction: four a multiprocessor of an H100, whatever the GPU, so that sums
# are added in one order everywhere.
REDUCTION_PROGRAMS = 528


@dataclass(frozen=True)
class WgradConfig:
    """Tile of a weight gradient: block_co x block_c channels; block_n x block_h x block_w pixels a step."""

    block_co: int
    block_c: int
    block_n: int
    block_h: int
    block_w: int
    num_warps: int
    num_stages: int

    def tiles(self, n: int, h: int, w: int) -> int:
        """How many steps cover ``n`` maps of ``h`` x ``w`` pixels."""
        return -(-n // self.block_n) * -(-h // self.block_h) * -(-w // self.block_w)

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            "BLOCK_CO": self.block_co,
            "BLOCK_C": self.block_c,
            "BLOCK_N": self.block_n,
            "BLOCK_H": self.block_h,
            "BLOCK_W": self.block_w,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **FUSION,
        }


def wgrad_configs(
    columns: Sequence[int], out_channels: int, height: int, width: int, dtype: torch.dtype, *, precise: bool = False
) -> list[WgradConfig]:
    """Tile for the weight gradient of each source: ``columns`` are its channels, times taps where they share a program.

    All take the same pixels a step, for sources that were concatenated share their slabs.
    """
    if precise:  # as in conv_config: plain multiply-adds live in registers
        blocks = [(power_of_2(out_channels, 16, 32), power_of_2(c, 16, 32)) for c in columns]
        pixels, stages = 32, 2
    else:
        # 64 pixels of 128 + 128 channels in 16 bits are 32 KB; three stages fit 99 KB.
        blocks = [(power_of_2(out_channels, 16, 128), power_of_2(c, 16, 128)) for c in columns]
        pixels, stages = 32 if dtype == torch.float32 else 64, 3
        if min(block_co * block_c for block_co, block_c in blocks) <= 32 * 32:
            # Of 64 sm_80 spills their addresses; of 32 in 2 rows of 16 sm_90a spills two registers, by Triton 3.9.
            pixels, width = 32, min(width, 8)
    tile = _tile(pixels, height, width)
    return [
        WgradConfig(*block, *tile, num_warps=8 if math.prod(block) > 64 * 128 else 4, num_stages=stages)
        for block in blocks
    ]


def slabs(tiles: int, blocks: int) -> tuple[int, int]:
    """(slabs, tiles a slab) of a reduction over ``tiles`` that ``blocks`` programs each make a slab of."""
    steps = -(-tiles // max(1, REDUCTION_PROGRAMS // blocks))
    return -(-tiles // steps), steps


def reduce_blocks(slabs: int) -> tuple[int, int]:
    """(slabs, columns) of a step that adds slabs: many slabs are those of few columns, a bias."""
    block_s = power_of_2(slabs, 1, 64)
    return block_s, 2048 // block_s


@remembered
def cell_config(channels: int) -> PointwiseConfig:
    """Tile of 2x2 cells: four times the loads of a pixel's, so a quarter of :func:`pointwise_config`'s elements."""
    block_c = power_of_2(channels, 1, 64)
    return PointwiseConfig(block_p=1024 // block_c, block_c=block_c, num_warps=4)


@remembered
def gather_config(channels: int) -> PointwiseConfig:
    """Tile of a gather of 16 neighbours: at most 8 elements and half a pixel a thread, as the weights of more spill."""
    block_c = power_of_2(channels, 1, 64)
    return PointwiseConfig(block_p=min(64, 1024 // block_c), block_c=block_c, num_warps=4)
