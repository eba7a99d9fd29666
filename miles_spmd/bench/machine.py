"""Ranks that measure: how they join a process group, and how they time collective work."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from miles_spmd.worker.meeting import Place, bind_sockets, store_without_keys

T = TypeVar("T")


def join() -> None:
    """Form the process group of the ranks that a launcher has started."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    place = Place.from_environment()
    bind_sockets(place)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=store_without_keys(place, timedelta(minutes=5)),
        rank=place.rank,
        world_size=place.world_size,
    )
    if torch.cuda.is_available():
        dist.all_reduce(torch.zeros(1, device="cuda"))


def stage(name: str) -> None:
    """Print to stderr, on the first rank, which part begins and the age of this process in seconds."""
    if dist.get_rank() == 0:
        age = time.time() - psutil.Process().create_time()
        print(f"{age:6.1f} s  {name}", file=sys.stderr, flush=True)


def leave() -> None:
    """Destroy the process group when all ranks have come here."""
    dist.barrier()
    dist.destroy_process_group()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> tuple[float, T]:
    """Return the seconds from a barrier of all ranks until this rank's device is done, and the function's result."""
    synchronize()
    dist.barrier(group)
    began = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - began, result


def slowest(seconds: list[float], group: dist.ProcessGroup | None = None) -> float:
    """Return the median over repetitions of the slowest rank's time. Collective."""
    return statistics.median(map(max, zip(*everywhere(seconds, group))))


def everywhere(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the ``value`` of every rank. Collective."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def free_gib() -> float:
    """Return the free memory of this rank's device, 0 on a CPU."""
    return torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0.0
