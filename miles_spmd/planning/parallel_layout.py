"""The place of each rank in Megatron's groups and in our engines, as arithmetic on rank numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from miles_spmd.config import Config
from miles_spmd.config.checks import settings
from miles_spmd.types.engine_group import JUDGE

Groups = list[list[int]]


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of all groups. ``dp`` counts replicas that see different sequences, ``edp`` the same for expert weights."""

    world_size: int
    judge_num_gpus: int  # the last so many ranks only judge
    second_num_gpus: int  # of the others the last so many have a second policy
    rollout_num_gpus: int  # of the others the last so many only generate, and the rest only trains; 0: all do both
    tp: int
    cp: int
    pp: int
    ep: int
    etp: int
    engine_tp: int
    judge_tp: int
    sequence_parallel: bool
    distributed_optimizer: bool

    @classmethod
    def of(cls, config: Config, world_size: int) -> ParallelLayout:
        """``config`` must have passed its checks for this ``world_size``."""
        s = settings(config)
        return cls(
            world_size=world_size,
            judge_num_gpus=s["judge_num_gpus"],
            second_num_gpus=s["second_num_gpus"],
            rollout_num_gpus=s["rollout_num_gpus"],
            tp=s["tensor_model_parallel_size"],
            cp=s["context_parallel_size"],
            pp=s["pipeline_model_parallel_size"],
            ep=s["expert_model_parallel_size"],
            etp=s["expert_tensor_parallel_size"] or s["tensor_model_parallel_size"],
            engine_tp=s["tp_size"],
            judge_tp=config.engine_group(JUDGE).tp_size if config.has_judge else 1,
            sequence_parallel=s["sequence_parallel"],
            distributed_optimizer=s["use_distributed_optimizer"],
        )

    @property
    def trainer_ranks(self) -> range:
        return range(self.second_ranks.start - self.rollout_num_gpus)

    @property
    def engine_ranks(self) -> range:
        return range(len(self.trainer_ranks) if self.rollout_num_gpus else 0, self.second_ranks.start)

    @property
    def second_ranks(self) -> range:
        return range(self.judge_ranks.start - self.second_num_gpus, self.judge_ranks.start)

    @property
    def judge_ranks(self) -> range:
        return range(self.world_size - self.judge_num_gpus, self.world_size)

    @property
    def sides(self) -> dict[str, range]:
        """The ranks that have duties of their own, by name; "": those that both train and generate."""
        apart = {"trainers": self.trainer_ranks, "engines": self.engine_ranks}
        of_policy = apart if self.rollout_num_gpus else {"": self.trainer_ranks}
        second = {"second_policy": self.second_ranks} if self.second_num_gpus else {}
        return of_policy | second | ({"judges": self.judge_ranks} if self.judge_num_gpus else {})

    @property
    def dp(self) -> int:
        return len(self.trainer_ranks) // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        return len(self.trainer_ranks) // (self.etp * self.ep * self.pp)

    @property
    def engines(self) -> int:
        return len(self.engine_ranks) // self.engine_tp

    @property
    def _axes(self) -> tuple[dict[str, int], dict[str, int]]:
        """Megatron's rank order, slowest axis first, of dense weights and of experts."""
        return (
            {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp},
            {"pp": self.pp, "edp": self.edp, "ep": self.ep, "etp": self.etp},
        )

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the rank's position in each of its groups."""
        where: dict[str, int] = {}
        for sizes in self._axes if rank in self.trainer_ranks else ():
            where |= zip(sizes, map(int, np.unravel_index(rank, tuple(sizes.values()))))
        if rank in self.engine_ranks:
            where["engine"] = (rank - self.engine_ranks.start) // self.engine_tp
        if rank in self.judge_ranks:
            where["judge"] = (rank - self.judge_ranks.start) // self.judge_tp
        return where

    def groups(self, axis: str) -> Groups:
        """Return the groups of ranks whose positions differ in ``axis`` only, in the order of their first ranks."""
        sizes = next(sizes for sizes in self._axes if axis in sizes)
        ranks = np.reshape(self.trainer_ranks, tuple(sizes.values()))
        return np.moveaxis(ranks, list(sizes).index(axis), -1).reshape(-1, sizes[axis]).tolist()

    def engine_groups(self) -> Groups:
        return _blocks(self.engine_ranks, self.engine_tp)

    def judge_groups(self) -> Groups:
        return _blocks(self.judge_ranks, self.judge_tp)


def _blocks(ranks: range, size: int) -> Groups:
    return [list(ranks[first : first + size]) for first in range(0, len(ranks), size)]
