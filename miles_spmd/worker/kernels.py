"""The compiled kernels of a rank: its node's cache, and whether this rank writes the copy that nodes share."""

from __future__ import annotations

from miles_spmd.config import Config
from miles_spmd.planning.parallel_layout import ParallelLayout
from miles_spmd.platform.kernel_cache import KernelCache, shared_folder
from miles_spmd.telemetry.environment import gpus, processor
from miles_spmd.worker.meeting import Place


class Kernels(KernelCache):
    """The node's cache for the rank at ``place``, by the devices here and the side of the run."""

    def __init__(self, config: Config, place: Place) -> None:
        self._place, sides = place, ParallelLayout.of(config, place.world_size).sides
        side, self._first = next((name, ranks[0]) for name, ranks in sides.items() if place.rank in ranks)
        device = ", ".join(sorted({f"{gpu.name} {gpu.capability}" for gpu in gpus()})) or processor()
        super().__init__(config.run.kernel_cache or shared_folder(), device, side)

    @property
    def writes(self) -> bool:
        """Whether this rank writes the shared copy: the first one of a side, and of a node whose devices are others
        than the first one's."""
        first = self._place.rank == self._first
        return first or (self._place.local_rank == 0 and not self.archive.exists())
