"""One process or several: what ``torchrun`` started, as a context."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from .settings import TrainingError


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; ``device`` is its own, ``store`` what all can look into."""

    device: torch.device
    rank: int = 0
    count: int = 1
    store: dist.Store | None = None  # pyright: ignore[reportPrivateImportUsage]
    PATIENCE: ClassVar[timedelta] = timedelta(seconds=10)  # with a process that is about to write a few lines

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.rank == 0

    def gathered(self, value: Any) -> list[Any]:
        """``value`` of every process, by rank."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def once(self, text: str, say: Callable[[], None]) -> None:
        """Call ``say`` if no other process has come with the same text, else return when that one has said it.

        So what only one process finds is said, and what all find is said once.
        """
        if self.store is None:
            return say()
        said = f"said: {text}"
        try:
            if self.store.add(f"to say: {text}", 1) > 1:
                self.store.wait([said], self.PATIENCE)  # torchrun ends all processes when the first does
                return
            say()
            self.store.set(said, "")
        except dist.DistError:  # whoever was to say it died, or who keeps the store: rather twice than never
            say()


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the group of ``torchrun``, by NCCL on GPUs (one each) and Gloo on CPUs; alone, do nothing.

    Raises:
        TrainingError: this machine has fewer GPUs than processes.
    """
    if not dist.is_torchelastic_launched():
        yield Processes(torch.device(device))
        return
    own = torch.device(device)
    if own.type == "cuda":
        own, found = torch.device("cuda", int(os.environ["LOCAL_RANK"])), torch.cuda.device_count()
        if own.index >= found:
            raise TrainingError(f"device: expected a GPU for each of torchrun's processes here, got {found}")
        torch.cuda.set_device(own)
    store, rank, count = next(dist.rendezvous("env://"))  # pyright: ignore[reportPrivateImportUsage]
    backend = "nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        yield Processes(own, rank, count, store)
    finally:
        dist.destroy_process_group()
