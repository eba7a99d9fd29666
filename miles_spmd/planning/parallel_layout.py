"""The place of each rank in Megatron's groups and in our engines, as arithmetic on rank numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from miles_spmd.config import Config
from miles_spmd.config.checks import settings

Groups = list[list[int]]


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of all groups. ``dp`` counts replicas that see different sequences, ``edp`` the same for expert weights."""

    world_size: int
    rollout_num_gpus: int  # the last so many ranks only generate, the others only train; 0: all do both
    tp: int
    cp: int
    pp: int
    ep: int
    etp: int
    engine_tp: int
    sequence_parallel: bool
    distributed_optimizer: bool

    @classmethod
    def of(cls, config: Config, world_size: int) -> ParallelLayout:
        """``config`` must have passed its checks for this ``world_size``."""
        s = settings(config)
        return cls(
            world_size=world_size,
            rollout_num_gpus=s["rollout_num_gpus"],
            tp=s["tensor_model_parallel_size"],
            cp=s["context_parallel_size"],
            pp=s["pipeline_model_parallel_size"],
            ep=s["expert_model_parallel_size"],
            etp=s["expert_tensor_parallel_size"] or s["tensor_model_parallel_size"],
            engine_tp=s["tp_size"],
            sequence_parallel=s["sequence_parallel"],
            distributed_optimizer=s["use_distributed_optimizer"],
        )

    @property
    def trainer_ranks(self) -> range:
        return range(self.world_size - self.rollout_num_gpus)

    @property
    def engine_ranks(self) -> range:
        return range(len(self.trainer_ranks) if self.rollout_num_gpus else 0, self.world_size)

    @property
    def dp(self) -> int:
        return len(self.trainer_ranks) // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        return len(self.trainer_ranks) // (self.etp * self.ep * self.pp)

    @property
    def engines(self) -> int:
        return len(self.engine_ranks) // self.engine_tp

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the rank's position in each of its groups. Megatron's rank order: tensor fastest, then context, data,
        pipeline."""
        where: dict[str, int] = {}
        if rank in self.trainer_ranks:
            where |= _unravel(rank, {"etp": self.etp, "ep": self.ep, "edp": self.edp, "pp": self.pp})
            where |= _unravel(rank, {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp})
        if rank in self.engine_ranks:
            where["engine"] = (rank - self.engine_ranks.start) // self.engine_tp
        return where

    def groups(self, axis: str) -> Groups:
        """Return the groups of ranks whose positions differ in ``axis`` only, in the order of their first ranks."""
        family = ("tp", "cp", "dp", "pp") if axis in ("tp", "cp", "dp", "pp") else ("etp", "ep", "edp", "pp")
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in self.trainer_ranks:
            where = self.coordinates(rank)
            found.setdefault(tuple(where[a] for a in family if a != axis), []).append(rank)
        return list(found.values())

    def engine_groups(self) -> Groups:
        return [list(self.engine_ranks[e * self.engine_tp :][: self.engine_tp]) for e in range(self.engines)]


def _unravel(rank: int, sizes: Mapping[str, int]) -> dict[str, int]:
    where = {}
    for axis, size in sizes.items():
        rank, where[axis] = divmod(rank, size)
    return where
