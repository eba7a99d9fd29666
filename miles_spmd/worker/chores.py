"""What a rank does beside the controller's commands."""

from __future__ import annotations

import itertools

import torch

from miles_spmd.platform.gpu_health import GpuMonitor
from miles_spmd.types.gpu_health import GpuHealth
from miles_spmd.worker.kernels import Kernels
from miles_spmd.worker.log import Log
from miles_spmd.worker.meeting import Place

COMPILED = 3  # in this step of a run nothing is left to compile: the first one is followed by a refit for the second


class Chores:
    """Looks after the ``log``, the ``kernels``, and the GPUs of the host; None: not on this rank."""

    def __init__(
        self, log: Log | None = None, kernels: Kernels | None = None, monitor: GpuMonitor | None = None
    ) -> None:
        self._log, self._kernels, self._monitor = log, kernels, monitor
        self._steps = itertools.count(1)

    def begin_step(self) -> None:
        """Call it before the first command of each step."""
        if self._monitor:
            self._monitor.ask()
        if self._kernels and next(self._steps) == COMPILED and self._kernels.writes:
            self._kernels.fill()

    def check(self) -> None:
        """Raise what a command has not raised itself: an OSError of the log."""
        if self._log:
            self._log.check()

    def health(self) -> list[GpuHealth]:
        """Return what was read of the GPUs since the last call."""
        return self._monitor.take() if self._monitor else []


def gpu_monitor(place: Place) -> GpuMonitor | None:
    """Start to watch the GPUs of this host, on its first rank."""
    if place.local_rank or not torch.cuda.is_available():
        return None
    uuids = [f"GPU-{torch.cuda.get_device_properties(number).uuid}" for number in range(place.local_world_size)]
    monitor = GpuMonitor(uuids)
    monitor.start()
    return monitor
