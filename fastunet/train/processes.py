"""One process or several: what ``torchrun`` started, as a context."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; ``device`` is its own."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.rank == 0


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the group of ``torchrun``, by NCCL on GPUs (one each) and Gloo on CPUs; alone, do nothing."""
    if not dist.is_torchelastic_launched():
        yield Processes(torch.device(device))
        return
    own = torch.device(device)
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield Processes(own, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
