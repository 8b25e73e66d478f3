"""A FastUNet trained by two processes: DistributedDataParallel and fully sharded, against one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastunet import FastUNet, dispatch
from fastunet.reference import UNet

from .test_model import assert_close
from .test_training import loss_of, through_the_operators

__all__ = ["through_the_operators"]  # a fixture


def in_two_processes(work: Callable[[int, str], None], folder: str) -> None:
    torch.multiprocessing.spawn(_join, (work, folder), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]


def _join(rank: int, work: Callable[[int, str], None], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        with dispatch.forced("torch"), Operators() as seen:
            work(rank, folder)
        assert seen.names >= {"conv2d_relu", "conv2d_relu_pool", "upsample_concat_conv2d_relu"}, seen.names
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # Gloo's threads outlive their group, and may abort an interpreter that ends (fastunet/cli/train.py).
    os._exit(0)


class Operators(TorchFunctionMode):
    """Which of fastunet's operators are called within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", None) == "fastunet":
            self.names.add(func.name().removeprefix("fastunet::"))
        return func(*args, **(kwargs or {}))


def _net() -> FastUNet:
    torch.manual_seed(0)
    return FastUNet(1, 2, (4, 6, 8)).double()


def _batch() -> Tensor:
    return torch.randn(4, 1, 12, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _data_parallel(rank: int, folder: str) -> None:
    model = nn.parallel.DistributedDataParallel(_net())
    loss_of(model, _batch()[2 * rank : 2 * rank + 2]).backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}.pt")


def _fully_sharded(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    outputs = []
    for _ in range(2):
        loss_of(model, _batch()[2 * rank : 2 * rank + 2]).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():  # prepared weights must be those of now
            outputs.append(model(_batch()))
        model.train()
    torch.save(outputs, f"{folder}/{rank}.pt")


def test_data_parallel_gradients_are_those_of_the_double_batch(tmp_path):
    in_two_processes(_data_parallel, str(tmp_path))
    model = _net()
    loss_of(model, _batch()).backward()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for p, a, b in zip(model.parameters(), first, second, strict=True):
        assert torch.equal(a, b)
        assert_close(a, p.grad)


def test_fully_sharded_steps_are_those_of_one_process(tmp_path):
    in_two_processes(_fully_sharded, str(tmp_path))
    model = _net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    outputs = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for step in range(2):
        loss_of(model, _batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            expected = UNet.forward(model, _batch())
        for rank in range(2):
            assert_close(outputs[rank][step], expected, 1e-9)
