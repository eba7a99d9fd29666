"""Which ranks of a run train, which generate and which judge, and the torch.distributed world that each of them lives
in.

Megatron and SGLang both build on the default process group. Colocated, it is the group of all ranks of the policy.
Disaggregated, the ranks that train have one and the ranks that generate have another, each numbered from 0, so that
neither backend has to handle ranks that it does not use; the group of all ranks of the policy stays beside it for
refits. Ranks that judge have one of their own, and nothing in common with the others. So have those of a second policy,
which all train and generate.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from miles_spmd.types.engine_group import JUDGE, POLICY, SECOND_POLICY


@dataclass(frozen=True)
class Side:
    """The duties of this rank. ``generates``: it holds an engine of ``group``. ``refits``: trainers of the run give the
    engines of its group their weights. ``everyone`` is the process group of all ranks of its policy; None: the default
    group."""

    trains: bool = True
    generates: bool = True
    refits: bool = True
    group: str = POLICY
    everyone: dist.ProcessGroup | None = None


def take_side(
    rollout_num_gpus: int, timeout: timedelta, judge_num_gpus: int = 0, second_num_gpus: int = 0, *, trains: bool = True
) -> Side:
    """Assign the last ``judge_num_gpus`` ranks of the default group to the judge, of the others the last
    ``second_num_gpus`` to the second policy, of the others the last ``rollout_num_gpus`` to generation and the rest to
    training, and make a default group for this rank's side, with ``timeout`` for its collectives. Collective.
    ``rollout_num_gpus`` 0: all ranks of the first policy do both. Where nothing ``trains``, all generate.
    """
    if judge_num_gpus and _split(judge_num_gpus, ("policy", "judges"), timeout):
        return Side(trains=False, refits=False, group=JUDGE)
    if second_num_gpus and _split(second_num_gpus, ("first policy", "second policy"), timeout):
        return Side(trains=trains, refits=trains, group=SECOND_POLICY)
    if not trains:
        return Side(trains=False, refits=False)
    everyone = dist.group.WORLD
    if torch.cuda.is_available():
        # NCCL sets a group up in its first collective; a refit, which sends from rank to rank, is not one
        dist.all_reduce(torch.zeros(1, device="cuda"))
        torch.cuda.synchronize()
    if not rollout_num_gpus or everyone is None:
        return Side()
    generates = _split(rollout_num_gpus, ("trainers", "engines"), timeout)
    return Side(trains=not generates, generates=generates, everyone=everyone)


def _split(last: int, names: tuple[str, str], timeout: timedelta) -> bool:
    """Make a default group of the ``last`` ranks of the default group, and another one of the others; return whether
    this rank is among the last. Collective."""
    whole = dist.group.WORLD
    assert whole is not None
    others = whole.size() - last
    is_last = whole.rank() >= others
    name, first, size = (names[1], others, last) if is_last else (names[0], 0, others)
    backend, store = dist.get_backend_config(), whole.get_group_store()
    distributed_c10d._update_default_pg(None)  # the group stays registered; it only stops being the default
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(name, store),
        rank=whole.rank() - first,
        world_size=size,
        timeout=timeout,
    )
    # torch's "global rank" is a rank of the default group, and the whole group maps to global ranks. So its map is made
    # new: this side's ranks get the numbers of their new default group, those of the other side follow.
    numbers = {(rank - first) % whole.size(): rank for rank in range(whole.size())}
    distributed_c10d._world.pg_group_ranks[whole] = numbers
    return is_last
