"""Which ranks of a run train and which generate, and the torch.distributed world that each of them lives in.

Megatron and SGLang both build on the default process group. Colocated, it is the group of all ranks. Disaggregated, the
ranks that train have one and the ranks that generate have another, each numbered from 0, so that neither backend has to
handle ranks that it does not use; the group of all ranks stays beside it for refits.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d


@dataclass(frozen=True)
class Side:
    """The duties of this rank. ``everyone`` is the group of all ranks of the run; None: the default group."""

    trains: bool = True
    generates: bool = True
    everyone: dist.ProcessGroup | None = None


def take_side(rollout_num_gpus: int, timeout: timedelta) -> Side:
    """Assign the last ``rollout_num_gpus`` ranks of the default group to generation and the others to training, and
    make a default group for this rank's side, with ``timeout`` for its collectives. Collective. 0: all ranks do both.
    """
    everyone = dist.group.WORLD
    if not rollout_num_gpus or everyone is None:
        return Side()
    trainers = everyone.size() - rollout_num_gpus
    generates = everyone.rank() >= trainers
    name, first, size = ("engines", trainers, rollout_num_gpus) if generates else ("trainers", 0, trainers)
    backend, store = dist.get_backend_config(), everyone.get_group_store()
    distributed_c10d._update_default_pg(None)  # the group stays registered; it only stops being the default
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(name, store),
        rank=everyone.rank() - first,
        world_size=size,
        timeout=timeout,
    )
    # torch's "global rank" is a rank of the default group, and the group of all ranks maps to global ranks. So its map
    # is made new: this side's ranks get the numbers of their new default group, those of the other side follow.
    numbers = {(rank - first) % everyone.size(): rank for rank in range(everyone.size())}
    distributed_c10d._world.pg_group_ranks[everyone] = numbers
    return Side(trains=not generates, generates=generates, everyone=everyone)
