"""The compiled kernels of a rank: its node's cache, and whether this rank writes the copy that nodes share."""

from __future__ import annotations

from miles_spmd.config import Config
from miles_spmd.platform.kernel_cache import KernelCache, shared_folder
from miles_spmd.telemetry.environment import gpus, processor
from miles_spmd.worker.meeting import Place


class Kernels(KernelCache):
    """The node's cache for the rank at ``place``, by the devices here and the side of the run."""

    def __init__(self, config: Config, place: Place) -> None:
        self._place, self._first_engine = place, place.world_size - config.rollout.rollout_num_gpus
        device = ", ".join(sorted({f"{gpu.name} {gpu.capability}" for gpu in gpus()})) or processor()
        side = "engines" if place.rank >= self._first_engine else "trainers"
        super().__init__(
            config.run.kernel_cache or shared_folder(), device, side if config.rollout.rollout_num_gpus else ""
        )

    @property
    def writes(self) -> bool:
        """Whether this rank writes the shared copy: the first one of a side, and of a node whose devices are others
        than the first one's."""
        first = self._place.rank in (0, self._first_engine)
        return first or (self._place.local_rank == 0 and not self.archive.exists())
