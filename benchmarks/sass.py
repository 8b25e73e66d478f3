"""Compile every shipped launch configuration without a GPU and read what the compiler made of it.

    python benchmarks/sass.py                 # sm_80 and sm_90a, all kernels: about 8 minutes
    python benchmarks/sass.py --once          # each configuration once
    python benchmarks/sass.py --once --share 0.3  # of the portable kernels' some, drawn anew, one of each at least
    python benchmarks/sass.py --portable tf32 --hopper fp16  # of each kind of kernels those dtypes alone
    python benchmarks/sass.py --json FILE     # the same table as JSON lines

The launchers run as they are, on meta tensors of the shapes that ``fastunet.trace`` gives for the
seed's network and the shipped model, and of layers that between them take every tile of the Hopper
kernels, with a driver that stands in for the GPU: what is compiled is what would be launched. Exits 1
if a kernel spills registers, if ptxas serialises a WGMMA, if a WGMMA takes its left operand from
registers, if a Hopper kernel has no WGMMA, if the shared memory does not fit, if anything is added by atomics, whose
order is another each time, or if a launch does not say whether products and sums are fused, which differs by version.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastunet import kernels, weights
from fastunet.config import UNetConfig
from fastunet.kernels import tuning
from fastunet.parity.launches import gradients
from fastunet.parity.launches import launches as launches_of_network

ARCHES = {80: "sm_80", 90: "sm_90a"}
# Bytes a block. What is compiled for sm_80 also serves sm_86, sm_89 and sm_120, which have less.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
HOPPER_DTYPES = "fp16", "bf16", "tf32"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}


@dataclasses.dataclass(frozen=True)
class Row:
    """What one compiled kernel uses."""

    kernel: str
    arch: str
    dtype: str
    tile: str
    registers: int
    spills: int
    shared: int
    mma: str
    faults: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel, the options of its launch and what ptxas said of it: nothing if it was in Triton's cache."""

    options: dict[str, Any]
    kernel: Any
    report: str


class StandInDriver:
    """As much of a driver as compiling needs: which device, which target."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> Any:
        return self.target.arch  # compiled kernels are cached per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextlib.contextmanager
def compiled_for(
    arch: int, *, once: bool = False, chosen: Callable[[], bool] = lambda: True
) -> Iterator[list[Compiled]]:
    """Within the block every launch is compiled for ``arch`` and collected, and none is made.

    Args:
        once: of the kernels that differ only in which of their arguments divide by 16 or are 1, the first.
        chosen: asked for each of a kernel's configurations but the first whether it is compiled, where ``once``.
    """
    collected: list[Compiled] = []
    configurations: set[Any] = set()
    functions: set[Any] = set()
    run, capability = JITFunction.run, tuning.capability

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        dtypes = tuple(arg.dtype for arg in args if isinstance(arg, torch.Tensor))
        configuration = self, dtypes, str(sorted(options.items()))
        if once and configuration in configurations:
            return None
        configurations.add(configuration)
        if once and self in functions and not chosen():
            return None
        functions.add(self)
        with contextlib.redirect_stdout(io.StringIO()) as report:
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        if all(kernel is not seen.kernel for seen in collected):
            collected.append(Compiled(options, kernel, report.getvalue()))
        return kernel

    modules = [module for module in vars(kernels).values() if hasattr(module, "capability")]
    JITFunction.run = compile_only  # type: ignore[method-assign]
    for module in modules:
        module.capability = lambda device: divmod(arch, 10)
    driver.set_active(StandInDriver(arch))  # pyright: ignore[reportArgumentType]
    try:
        with knobs.nvidia.scope(), knobs.compilation.scope():
            knobs.nvidia.dump_ptxas_log = True
            knobs.compilation.disable_line_info = True  # which nobody reads here, and takes a twelfth of the time
            yield collected
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
        for module in modules:
            module.capability = capability


def networks() -> Iterator[tuple[UNetConfig, tuple[int, int, int]]]:
    """The seed network with every upsampling and the nuclei model, at even and odd (batch, height, width).

    Triton compiles arguments that divide by 16, and those that are 1, to kernels of their own.
    """
    seed = UNetConfig()
    bilinear = [dataclasses.replace(seed, align_corners=corners) for corners in (False, True)]
    others = [dataclasses.replace(seed, upsample=upsample) for upsample in ("bilinear_conv", "nearest", "transpose")]
    for config in (*bilinear, *others, weights.NUCLEI_CONFIG):
        for size in (kernels.hopper.PARITY_SIZE, kernels.hopper.TUNED_SIZES[0]):
            yield config, size


def launches(dtype: torch.dtype, tf32: bool) -> Iterator[Callable[[], Any]]:
    """A call for each launch that the shipped networks make, and for what the operators take beyond them."""

    def t(*shape: int, fan_in: int = 1) -> torch.Tensor:
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)

    for config, size in networks():
        for launch in launches_of_network(config, size, t, tf32=tf32):
            yield launch.run
            for name in launch.commuted(hopper=False):
                yield lambda launch=launch, name=name: launch.run(name)
            # Of the upsamplings those that are launched otherwise, of the sizes one: compiling takes long.
            if config.align_corners and config.upsample in ("bilinear", "transpose") and size[1] % 2 == 0:
                for step in gradients(launch, t, tf32=tf32):
                    # Passes over memory compute in float32 in either case.
                    if tf32 or "tf32" in step.options:
                        yield step.run
    yield lambda: kernels.stem_fwd(t(2, 4, 256, 256), t(64, 4, 3, 3), t(64), slope=0.0, tf32=tf32)
    yield lambda: kernels.conv_fwd(t(1, 128, 64, 64), t(128, 128, 3, 3), None, slope=0.01, tf32=tf32)
    yield lambda: kernels.conv_pool_fwd(t(2, 24, 64, 64), t(160, 24, 3, 3), t(160), slope=0.0, tf32=tf32)
    of_head = t(2, 24, 64, 64), t(20, 24, 3, 3), t(20), t(16, 20, 1, 1), t(16)
    yield lambda: kernels.conv_head_fwd(*of_head, slope=0.0, tf32=tf32)
    yield lambda: kernels.conv_wgrad(t(2, 24, 63, 65), [t(2, 3, 63, 65)], 3, bias=False, tf32=tf32)
    yield lambda: kernels.conv_wgrad(t(2, 24, 63, 65), [t(2, 20, 62, 64), t(2, 24, 63, 65)], 3, bias=False, tf32=tf32)
    image, x, small = t(2, 3, 62, 64), t(2, 128, 62, 64), t(2, 64, 31, 32)
    of_image, weight, wide = t(64, 3, 3, 3), t(64, 128, 3, 3), t(64, 192, 3, 3)
    unpadded, oblong = {"pad": 0, "tf32": tf32}, t(64, 128, 1, 2)
    for how in ({"stride": (2, 2), "tf32": tf32}, unpadded):
        yield partial(kernels.stem_fwd, image, of_image, t(64), slope=0.0, **how)
        yield partial(kernels.conv_fwd, x, weight, t(64), slope=0.0, **how)
        g = t(2, 64, 31, 32) if "stride" in how else t(2, 64, 60, 62)
        yield partial(kernels.conv_dgrad, g, weight, size=(62, 64), **how)
        yield partial(kernels.conv_wgrad, g, [x], 3, bias=True, **how)
    yield partial(kernels.conv_pool_fwd, x, weight, t(64), slope=0.0, **unpadded)
    for mode in ("bilinear", "none"):
        up = partial(kernels.upconcat_conv3x3_fwd, mode=mode, align_corners=True, slope=0.0)
        yield partial(up, t(2, 64, 62, 64) if mode == "none" else small, x, wide, t(64), **unpadded)
    yield partial(kernels.conv_transpose_fwd, small, oblong, t(128), tf32=tf32)
    yield partial(kernels.conv_transpose_dgrad, t(2, 128, 31, 64), oblong, tf32=tf32)
    if tf32:  # these compute in float32 in either case
        for c, slope in ((64, 0.0), (64, 0.01), (3, 1.0)):
            x, one, act = t(2, c, 62, 65), torch.empty(c, device="meta"), {"slope": slope}
            pooled = t(2, c, 31, 32) if c == 64 else None
            yield partial(kernels.norm_fwd, x, one, one, eps=1e-5, pool=pooled is not None, **act)
            yield partial(kernels.norm_bwd, x, pooled, x, x, one, one, one, fixed=c == 3, **act)
            if c == 64:
                images = torch.empty(2, c, device="meta")
                yield partial(kernels.norm_fwd, x, one, one, eps=1e-5, pool=True, per_image=True, **act)
                yield partial(kernels.norm_bwd, x, pooled, x, x, one, images, images, **act)
        yield lambda: kernels.upsample_bwd(t(1, 24, 63, 65), 31, 32, mode="nearest", align_corners=False)
        for mode, corners in (("nearest", False), ("bilinear", False), ("bilinear", True)):
            yield lambda mode=mode, corners=corners: kernels.upsample_concat_fwd(
                t(1, 128, 128, 128), t(1, 64, 256, 256), mode=mode, align_corners=corners
            )


def hopper_launches(dtype: torch.dtype, full: bool) -> Iterator[Callable[[], Any]]:
    """Each kind of tile of the Hopper kernels, with and without what their epilogue and K loop may have.

    Args:
        full: every configuration that is offered for a layer of the seed's network at the sizes that are timed.
    """

    def t(*shape: int, fan_in: int = 1) -> torch.Tensor:
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)

    hopper = kernels.hopper
    kinds: set[Any] = set()
    for size in (kernels.hopper.PARITY_SIZE, *kernels.hopper.TUNED_SIZES) if full else ():
        for upsample in ("bilinear", "transpose"):
            for launch in launches_of_network(UNetConfig(upsample=upsample), size, t):
                for step in (launch, *gradients(launch, t)):
                    for config in step.hopper:
                        one_code = dataclasses.replace(config, splits=min(config.splits, 2))  # 2, 4 or 8 shares
                        of = "" if step.gradient else step.layer.op
                        kind = step.launcher, of, one_code, launch.tensors[-2].shape[2:]
                        if kind not in kinds:
                            kinds.add(kind)
                            yield lambda step=step, config=config: step.run(config)
    for op, n, c, h, o, slope in (
        ("pool", 16, 64, 256, 64, 0.0),  # 64 channels, in turns
        ("pool", 16, 128, 128, 128, 0.01),  # cooperative
        ("conv", 1, 1024, 16, 1024, 0.0),  # too few tiles: the K loop is split
        ("conv", 4, 512, 8, 512, 0.0),  # several images a tile
        ("head", 16, 64, 256, 16, 1.0),
    ):
        ksize = 1 if op == "head" else 3
        configs = hopper.hopper_configs((c,), o, n, h, h, dtype, ksize=ksize, pool=op == "pool")
        launcher = hopper.conv_pool_fwd if op == "pool" else hopper.conv_fwd
        for bias in (t(o), torch.empty(2, o, device="meta")):  # and with factors of the sums
            given = t(n, c, h, h), t(o, c, ksize, ksize), bias
            yield partial(launcher, *given, slope=slope, config=configs[0])
    for c, o, config in ((64, 64, 0), (128, 128, 0), (128, 128, 1)):  # 256 pixels, in turns and shared, and 128
        configs = hopper.hopper_configs((c,), o, 16, 256, 256, dtype, ksize=3, pool=False)
        given: Any = {"eps": 1e-5, "per_image": bool(config), "config": configs[config]}
        yield partial(hopper.conv_moments_fwd, t(16, c, 256, 256), t(o, c, 3, 3), t(o), **given)
    yield lambda: hopper.upconcat_conv3x3_fwd(
        t(16, 128, 64, 64),
        t(16, 128, 128, 128),
        t(128, 256, 3, 3),
        t(128),
        mode="bilinear",
        align_corners=True,
        slope=0.0,
    )
    yield lambda: hopper.upconcat_conv3x3_commuted_fwd(
        t(16, 256, 32, 32),
        t(16, 128, 64, 64),
        t(128, 384, 3, 3),
        t(128),
        mode="bilinear",
        align_corners=True,
        slope=0.0,
    )
    yield lambda: hopper.conv_transpose_fwd(t(16, 256, 64, 64), t(256, 128, 2, 2), t(128))


def assemble(ptx: str, arch: int) -> str:
    """The report of ptxas."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={ARCHES[arch]}", source, "-o", Path(folder, "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def examine(compiled: Compiled, arch: int, dtype: str) -> Row:
    """What ptxas reports, and the instructions that the PTX names."""
    options, kernel = compiled.options, compiled.kernel
    ptx = kernel.asm["ptx"]
    report = compiled.report or assemble(ptx, arch)
    registers = int(re.findall(r"Used (\d+) registers", report)[0])
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))
    found = set(re.findall(r"\bwgmma\.mma_async|\bmma\.sync|\bfma\.rn\.f32|\bcp\.async\.bulk\.tensor", ptx))
    # A WGMMA names its accumulators, then its left operand: registers in braces, or a descriptor of shared memory.
    from_registers = len(re.findall(r"wgmma\.mma_async[^{;]*\{[^}]*\},\s*\{", ptx))
    shared = int(kernel.metadata.shared)
    faults = []
    if spills:
        faults.append(f"spills {spills} bytes")
    if re.search(r"wgmma.*serialized|C7510|C7514|C7515", report, re.IGNORECASE):
        faults.append("wgmma serialized")
    if from_registers:
        faults.append(f"{from_registers} WGMMA read their left operand from registers")
    if re.search(r"\b(?:atom|red)\.|\bcp\.reduce\b", ptx):
        faults.append("adds by atomics, in any order")
    if "enable_fp_fusion" not in options:
        faults.append("leaves it to Triton's version whether products and sums are fused")
    if shared > SHARED_LIMIT[arch]:
        faults.append(f"shared memory {shared} of {SHARED_LIMIT[arch]} bytes")
    names = ("BLOCK_CO", "BLOCK_N", "BLOCK_H", "BLOCK_W", "BLOCK_K", "BLOCK_P", "BLOCK_C")
    tile = "x".join(str(options[name]) for name in names if name in options)
    kinds = {"wgmma.mma_async": "WGMMA", "mma.sync": "MMA", "fma.rn.f32": "FMA"}
    mma = next((kind for instruction, kind in kinds.items() if instruction in found), "-")
    mode = options.get("MODE")
    stages = f" s{options['num_stages']}" if "num_stages" in options else ""
    if "X_STAGES" in options:
        stages = f" s{options['X_STAGES']}+{options['W_STAGES']}" + " halo" * options["HALO"]
        if "wgmma.mma_async" not in found:
            faults.append("no WGMMA")
    if options.get("SPLITS", 1) > 1:
        stages += f" /{options['SPLITS']}"
    return Row(
        kernel=kernel.metadata.name.strip("_").removesuffix("_kernel") + (f" {mode}" if mode else ""),
        arch=ARCHES[arch],
        dtype=dtype,
        tile=f"{tile} w{options['num_warps']}" + stages,
        registers=registers,
        spills=spills,
        shared=shared,
        mma=mma + (" +TMA" if "cp.async.bulk.tensor" in found else ""),
        faults=tuple(faults),
    )


def compile_all(job: tuple[str, int, str], once: bool, share: float, seed: int) -> list[Row]:
    """Rows of one kind of kernels, architecture and dtype."""
    kind, arch, dtype = job
    numbers = random.Random(seed)
    if kind == "hopper":
        found, share = hopper_launches(DTYPES[dtype], full=dtype != "bf16"), 1.0  # bf16 has fp16's instructions
    else:
        found = launches(DTYPES[dtype], tf32=dtype != "ieee")
    with compiled_for(arch, once=once, chosen=lambda: numbers.random() < share) as collected:
        for launch in found:
            launch()
    return [examine(compiled, arch, dtype) for compiled in collected]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=sorted(ARCHES), help="80 or 90; default both")
    for kind, dtypes in (("portable", sorted(DTYPES)), ("hopper", HOPPER_DTYPES)):
        parser.add_argument(
            f"--{kind}", action="append", choices=dtypes, help="default all, unless the other kind is named"
        )
    parser.add_argument("--once", action="store_true", help="not for every alignment of arguments")
    parser.add_argument("--share", type=float, default=1.0, metavar="X", help="of the portable kernels, with --once")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="of what is drawn; default another")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON lines")
    arguments = parser.parse_args()
    portable, hopper = arguments.portable or [], arguments.hopper or []
    if not portable and not hopper:
        portable, hopper = DTYPES, HOPPER_DTYPES
    if arguments.share < 1 and not arguments.once:
        parser.error("--share: expected beside --once")
    arches = arguments.arch or ARCHES
    jobs = [("hopper", 90, dtype) for dtype in hopper if 90 in arches]
    jobs += [("portable", arch, dtype) for arch in arches for dtype in portable]
    how = {"once": arguments.once, "share": arguments.share, "seed": arguments.seed}
    with ProcessPoolExecutor(max_workers=2) as pool:
        rows = [row for part in pool.map(partial(compile_all, **how), jobs) for row in part]
    table = Table(title=f"Ahead-of-time compilation, Triton {triton.__version__}")
    for name in ("kernel", "arch", "dtype", "tile", "registers", "spills", "shared", "MMA", "faults"):
        table.add_column(name, justify="right" if name in ("registers", "spills", "shared") else "left", no_wrap=True)
    for row in rows:
        cells = dataclasses.astuple(row)
        table.add_row(*map(str, cells[:-1]), "; ".join(row.faults), style="red" if row.faults else None)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    bad = [row for row in rows if row.faults]
    drawn = f" (--share {arguments.share} --seed {arguments.seed})" if arguments.share < 1 else ""
    print(f"{len(rows)} kernels compiled{drawn}, {len(bad)} with faults")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
