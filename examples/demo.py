"""Segment a microscope image with the shipped weights and check the result against plain PyTorch.

    python examples/demo.py        # or: make demo

Three forwards of one network on one image: FastUNet (the candidate), fastunet.reference.UNet in
the same dtype (the baseline) and the reference in float64 (the truth). Exits 1 without parity.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastunet.images import normalise, overlay, read_image, write_png
from fastunet.parity import compare
from fastunet.predict import predict_mask
from fastunet.reference import UNet
from fastunet.weights import NUCLEI, load

HERE = Path(__file__).parent
OUT = Path("demo-output")
REPEATS = 3


def milliseconds(forward: Callable[[], Tensor]) -> float:
    """Median wall time of a few forwards of a network that has run before."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        forward().cpu()  # waits for the device
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


@torch.inference_mode()
def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    image = read_image(HERE / "nuclei.png")
    label = torch.from_numpy(read_image(HERE / "nuclei_mask.png") > 0)

    model = load(NUCLEI, device=device, dtype=dtype)
    reference = UNet.from_config(model.config).to(device, dtype).eval()
    reference.load_state_dict(model.state_dict())
    x = normalise(image, model.config.in_channels)[None].to(device, dtype)

    candidate, baseline = model(x), reference(x)
    fast, plain = milliseconds(lambda: model(x)), milliseconds(lambda: reference(x))
    truth = reference.cpu().double()(x.cpu().double())
    parity = compare(candidate.cpu(), baseline.cpu(), truth)

    mask = torch.from_numpy(predict_mask(model, image)) > 0
    dice = 2 * (mask & label).sum().item() / (mask.sum() + label.sum()).item()
    OUT.mkdir(exist_ok=True)
    write_png(OUT / "nuclei_mask.png", mask.numpy().astype("uint8") * 255)
    write_png(OUT / "nuclei_overlay.png", overlay(image, mask.numpy()))

    height, width = image.shape[:2]
    table = Table(title=f"{width}x{height} image, {device}, {str(dtype).removeprefix('torch.')}", box=box.SIMPLE)
    table.add_column("")
    table.add_column("FastUNet", justify="right")
    table.add_column("plain PyTorch", justify="right")
    table.add_row("largest error against float64", f"{parity.candidate_error:.2e}", f"{parity.baseline_error:.2e}")
    table.add_row("pixels of another class than float64's", flips(candidate, truth), flips(baseline, truth))
    table.add_row(f"wall time, median of {REPEATS}", f"{fast:.0f} ms", f"{plain:.0f} ms")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"Dice against the annotated mask: {dice:.3f}. Overlay: {OUT / 'nuclei_overlay.png'}")
    console.print(f"[bold {'green' if parity.ok else 'red'}]{parity}", soft_wrap=True)
    return 0 if parity.ok else 1


def flips(logits: Tensor, truth: Tensor) -> str:
    return str((logits.cpu().argmax(1) != truth.argmax(1)).sum().item())


if __name__ == "__main__":
    sys.exit(main())
