"""The training loop: AdamW, cosine schedule with warm-up, averaged weights, checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from ..reference import UNet
from . import checkpoint
from .augment import Windows, indices
from .data import Data
from .loss import ending_in_logits, segmentation_loss
from .processes import Processes
from .settings import DTYPES, DivergedError, Settings, TrainingError
from .validate import validate


@dataclass(frozen=True)
class Point:
    """One row of the learning curve: where a validation found the run."""

    step: int
    lr: float
    loss: float  # mean over the steps since the last point
    val_loss: float
    dice: float  # of all pixels of the validation images together
    mean_dice: float  # mean of the images' own
    images_per_second: float  # windows trained on since the last point, without validation


def fit(
    model: UNet,
    data: Data,
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    process: Processes | None = None,
    workers: int = 0,
    resume: bool = False,
    on_start: Callable[[int], None] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    on_point: Callable[[Point], None] | None = None,
) -> list[Point]:
    """Train ``model`` in place, and write what it learns to the folder ``out``.

    ``best.safetensors`` and ``last.safetensors`` are the averaged weights, for
    :func:`fastunet.weights.load`, where their Dice over all validation pixels was highest and where
    the run got to; ``last.pt`` is all that continuing needs, for ``torch.load(weights_only=True)``;
    ``curve.csv`` and ``curve.png`` show the points returned. Each file is whole at any moment.

    Args:
        model: on any device; is moved to the process's.
        data: of :func:`fastunet.train.find`.
        process: this one among several; alone on the CPU by default.
        workers: processes that prepare windows; 0 does so between the steps. Changes no result.
        resume: continue the run that ``out`` holds, on a CPU to the same bits as if it had not
            stopped; where it holds none, begin one.
        on_start: called with the number of steps done before, 0 of a new run.
        on_step: called with the number of steps done and the step's loss, a scalar on the device.
        on_point: called after each checkpoint.

    Raises:
        TrainingError: ``out`` or a file in it cannot be written to; another process trains there; ``out``
            holds a run, or weights or curves of one, and ``resume`` is false, or holds another run than this,
            or not the same for all processes; ``data``, ``batch`` or ``size`` does not fit the model or the
            processes; the model's output is smaller than its input.
        ImageError: a file can no longer be read, of those too many to be kept in memory.
        DivergedError: the loss, a weight or a running statistic became NaN or infinite.
    """
    settings, process, out = settings or Settings(), process or Processes(torch.device("cpu")), Path(out)
    config = model.config
    settings.check(config)
    if (data.channels, data.classes) != (config.in_channels, config.out_channels):
        wanted = f"{config.in_channels} channels and {config.out_channels} classes, as the model"
        raise TrainingError(f"data: expected {wanted}, got {data.channels} and {data.classes}")
    if settings.batch % process.count:
        raise TrainingError(f"batch: expected a multiple of the {process.count} processes, got {settings.batch}")
    if len(data.val) < process.count:
        raise TrainingError(f"data: expected a validation image for each of {process.count} processes")
    identity = {"settings": dataclasses.asdict(settings), "config": config.to_json(), "data": data.fingerprint()}
    with checkpoint.open_run(out, identity, resume, process.first) as state:
        steps = process.gathered(0 if state is None else state["step"])
        if len(set(steps)) > 1:
            raise TrainingError(f"{out}: expected one folder for all processes, but they would go on at steps {steps}")
        run = _Run(model.to(process.device), settings, process, state)
        if on_start is not None:
            on_start(run.step)

        on_gpu = process.device.type == "cuda"
        loader = DataLoader(
            Windows(data, settings.size, settings.seed, settings.plain_from),
            batch_size=None,
            sampler=list(indices(run.step, settings.steps, settings.batch, process.rank, process.count)),
            num_workers=workers,
            pin_memory=on_gpu,
            generator=torch.Generator(),  # or it would take its seed from the run's random numbers
        )
        losses: list[Tensor] = []
        start = time.perf_counter()
        for batch in loader:
            losses.append(run.advance(*(tensor.to(process.device, non_blocking=on_gpu) for tensor in batch)))
            if on_step is not None:
                on_step(run.step, losses[-1])
            if run.step % settings.every and run.step < settings.steps:
                continue
            loss = run.mean(losses)
            speed = len(losses) * settings.batch / (time.perf_counter() - start)
            scores = validate(run.averaged, data, settings.dice_weight, process)
            run.points.append(Point(run.step, settings.lr * settings.rate(run.step - 1), loss, *scores, speed))
            if process.first:
                checkpoint.write(out, run.averaged, run.state() | identity, run.points)
            if on_point is not None:
                on_point(run.points[-1])
            losses, start = [], time.perf_counter()
    return run.points


class _Run:
    """All that changes while a network trains."""

    def __init__(self, model: UNet, settings: Settings, process: Processes, state: dict[str, Any] | None) -> None:
        self.model, self.process, self.device = model.train(), process, process.device.type
        self.average = AveragedModel(model, multi_avg_fn=self._averages, use_buffers=True)
        self.optimiser = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=settings.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device, enabled=settings.dtype == "fp16")
        self.settings, self.dtype = settings, DTYPES[settings.dtype]
        self.step, self.points = 0, list[Point]()
        self.parts = {
            "model": self.model,
            "average": self.average,
            "optimiser": self.optimiser,
            "scaler": self.scaler,
        }
        if state is not None:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step, self.points = state["step"], [Point(**point) for point in state["points"]]
            torch.set_rng_state(state["rng"])
        # Broadcasts the first process's weights; gradients are averaged as they arise.
        self.parallel: nn.Module = DistributedDataParallel(model) if process.count > 1 else model

    def _averages(self, *averaged_and_now: Any) -> None:
        get_ema_multi_avg_fn(self.settings.decay(self.step))(*averaged_and_now)

    def state(self) -> dict[str, Any]:
        points = [dataclasses.asdict(point) for point in self.points]
        own = {"step": self.step, "points": points, "rng": torch.get_rng_state()}
        return own | {name: part.state_dict() for name, part in self.parts.items()}

    @property
    def averaged(self) -> UNet:
        return cast(UNet, self.average.module)

    def advance(self, x: Tensor, target: Tensor) -> Tensor:
        """One step of the optimiser; returns the loss."""
        autocast = torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)
        with autocast, ending_in_logits(self.model):
            logits = self.parallel(x)
        loss = segmentation_loss(logits, target, self.settings.dice_weight)
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.lr * self.settings.rate(self.step)
        self.optimiser.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.average.update_parameters(self.model)
        self.step += 1
        return loss.detach()

    def mean(self, losses: list[Tensor]) -> float:
        """Of the finite losses, over all processes: a loss scale is found by steps that overflow and are skipped.

        Raises:
            DivergedError: none is finite, or not every weight and running statistic is.
        """
        loss = torch.stack(losses).double()
        if self.process.count > 1:
            dist.all_reduce(loss)
            loss /= self.process.count
        values = itertools.chain(self.model.parameters(), self.model.buffers())
        sound = torch.stack([value.isfinite().all() for value in values]).all()
        if not (sound and loss.isfinite().any()):
            raise DivergedError(f"loss or weights are NaN or infinite after {self.step} steps; try a lower lr")
        return loss[loss.isfinite()].mean().item()
