"""The processes of a run: who am I, gather, sum. One process needs none of it and costs nothing.

Processes are started from outside (`torchrun --nproc-per-node 2 -m omninft train ...`). Clips are dealt out in order,
scores are gathered before advantages are computed, gradients are summed (losses are divided by the count of the whole
iteration, so a sum is the mean).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# Waiting for one another: rank 0 alone loads judges, decodes and writes for minutes at a time.
TIMEOUT = timedelta(hours=2)


def available_cores() -> int:
    """Threads for this process: OMP_NUM_THREADS where it is set, as every OpenMP program takes it.

    Otherwise the cores it may run on, divided among the run's processes on this machine; at least 1.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # "4,2" are levels of nesting
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    # macOS and Windows know no affinity.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def default_device() -> str:
    """The GPU of this process among those of torchrun's on this machine, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def start_group(backend: str, rank: int, world: int) -> None:
    """Join the processes' group, on this process's own GPU where there is one.

    Gradients are reduced where they lie, by NCCL; what is counted and gathered on the host, by gloo. The device comes
    first, or every process would make its first CUDA tensors on GPU 0.

    Args:
        backend: "auto", "nccl" (CUDA tensors by it, CPU tensors by gloo) or "gloo" (both).
        rank: of this process.
        world: how many there are.
    """
    if backend == "gloo" or not torch.cuda.is_available():
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=TIMEOUT)
        return
    device = torch.device(default_device())
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", rank=rank, world_size=world, timeout=TIMEOUT, device_id=device)


class Processes:
    """Rank and size of the run's process group; single-process unless torchrun's variables say otherwise."""

    def __init__(self, backend: str = "auto") -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world > 1 and not dist.is_initialized():
            start_group(backend, self.rank, self.world)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every process's value, in rank order, on every process."""
        if self.world == 1:
            return [value]
        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add the tensors up over the processes, in place, in one transfer."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        offset = 0
        for tensor in tensors:
            tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
            offset += tensor.numel()

    def any(self, flag: bool) -> bool:
        """True on every process if it is on any."""
        return any(self.gather(flag))

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
