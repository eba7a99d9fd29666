"""A task of srun as a rank, without torchrun: its place, in the variables in which torchrun gives a rank its own."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from miles_spmd.types.variables import text, whole

MEETING = "MILES_SPMD_TASKS_MEET_AT"  # environment: the name of the folder in which these tasks meet


class SlurmTaskError(RuntimeError):
    """Tasks that cannot be the ranks of a run: why, and what to do."""


def adopt(environment: MutableMapping[str, str] = os.environ) -> None:
    """Where srun has started this process as one of several tasks, and no launcher has made it a rank, make it the rank
    of its task. Raises SlurmTaskError where ranks of a node would not have successive numbers, and VariableError."""
    if "RANK" in environment or "SLURM_PROCID" not in environment:
        return
    tasks = whole("SLURM_STEP_NUM_TASKS", 1, least=1, environment=environment)
    if tasks == 1:
        return
    task, node, local = (whole(f"SLURM_{name}", environment=environment) for name in ("PROCID", "NODEID", "LOCALID"))
    counts = tasks_per_node(text("SLURM_STEP_TASKS_PER_NODE", environment))
    if node >= len(counts) or task != sum(counts[:node]) + local:
        raise SlurmTaskError(
            f"task {task} of srun is number {local} on node {node}: ranks of a node need successive numbers; call srun "
            "with --distribution=block"
        )
    environment.update(RANK=str(task), WORLD_SIZE=str(tasks), LOCAL_RANK=str(local), LOCAL_WORLD_SIZE=str(counts[node]))
    environment.setdefault("MASTER_ADDR", hosts(text("SLURM_STEP_NODELIST", environment))[0])
    # Unique: a requeued job keeps its number and counts its steps from 0 again, and a cluster that was set up anew
    # counts its jobs from 1 again.
    parts = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID", "SLURM_STEP_LAUNCHER_PORT")
    environment[MEETING] = "_".join(environment.get(part, "0") for part in parts)


def tasks_per_node(counts: str) -> list[int]:
    """Return the numbers that Slurm writes as ``2(x3),1``."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def hosts(nodes: str) -> list[str]:
    """Return the names that Slurm writes as ``rack[1-2]n[01-16,20],login``."""
    return [name for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes) for name in _expand(part)]


def _expand(part: str) -> list[str]:
    before, bracket, rest = part.partition("[")
    if not bracket:
        return [part]
    numbers, _, after = rest.partition("]")
    found = []
    for one in numbers.split(","):
        first, _, last = one.partition("-")
        found += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return [f"{before}{number}{end}" for number in found for end in _expand(after)]
