"""`[slurm]`: the job that `miles-spmd slurm` submits."""

import re
from pathlib import Path
from typing import Annotated, Literal

from miles_spmd.config.checks import ERRORS, FILES, Messages, Settings, rule
from miles_spmd.config.table import NonNegativeInt, PositiveInt, Table, must_be

TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED")
CONTAINERS = ("apptainer", "pyxis")
# set by the script, or by another setting
OWN = {"nodes", "gpus-per-node", "time", "requeue", "no-requeue", "signal", "open-mode", "output", "job-name"}
SHORT = {"N": "nodes", "t": "time", "o": "output", "J": "job-name"}
ELSEWHERE = {"wait", "W", "test-only", "parsable", "help", "usage", "version", "h", "V"}  # for who calls sbatch alone
Line = Annotated[str, must_be("one line of printable text", str.isprintable)]
Time = Annotated[str, must_be("minutes, hours:minutes:seconds or days-hours", lambda text: bool(TIME.fullmatch(text)))]
Seconds = Annotated[int, must_be("between 60 and 65535", lambda seconds: 60 <= seconds <= 65535)]


class SlurmConfig(Table):
    partition: Line = ""
    """Partition; empty: the cluster's default, or SBATCH_PARTITION."""
    account: Line = ""
    """Account that the job is charged to; empty: the default, or SBATCH_ACCOUNT."""
    nodes: PositiveInt = 1
    """Number of nodes, which the job has for itself."""
    gpus_per_node: NonNegativeInt = 8
    """GPUs, and with that ranks, of each node. 0: the job runs on CPUs, with NPROC_PER_NODE ranks on each node."""
    time: Time = "24:00:00"
    """Time limit of the job. It is requeued when the time is over, and continues: what a partition prefers is right."""
    signal_seconds: Seconds = 300
    """Seconds before the end at which the run is asked to save and to stop. A step and a checkpoint have to fit."""
    launch: Literal["torchrun", "tasks"] = "torchrun"
    """`torchrun` starts the ranks of each node; with `tasks` srun starts every rank itself."""
    container: Line = ""
    """`apptainer:IMAGE` or `pyxis:IMAGE`; empty: the ranks run in the node's own system."""
    setup: list[Line] = []
    """Shell commands that the job runs at its start, such as `module load cuda`. One that fails ends the job."""
    options: list[Line] = []
    """More options of sbatch, such as `--qos=long`."""


@rule(ERRORS)
def _container(s: Settings) -> Messages:
    kind, _, image = s.container.partition(":")
    if s.container and (kind not in CONTAINERS or not image):
        yield f"slurm.container: must be apptainer:IMAGE or pyxis:IMAGE, got {s['slurm.container']!r}"


@rule(ERRORS)
def _time(s: Settings) -> Messages:
    limit = _seconds(s.time)
    if limit and limit <= s.signal_seconds:
        yield (
            f"slurm.signal_seconds: must be shorter than slurm.time, or the job is stopped before it begins, got "
            f"{s.signal_seconds} s of {limit} s"
        )


def _seconds(time: str) -> int:
    """Return the seconds of a time limit as Slurm reads it: minutes, minutes:seconds, hours:minutes:seconds, and after
    days hours, hours:minutes or hours:minutes:seconds; 0: no limit."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) if part.isdecimal() else 0 for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units))


@rule(FILES)
def _image(s: Settings) -> Messages:
    image = s.container.partition(":")[2]
    if image.startswith("/") and not Path(image).exists():
        yield f"slurm.container: no file {image}"


@rule(ERRORS)
def _options(s: Settings) -> Messages:
    for number, option in enumerate(s.options):
        found = re.match(r"--([a-z-]+)|-(\w)", option)
        if found is None:
            yield f"slurm.options.{number}: {option!r} is not an option of sbatch, which begins with -- or -"
            continue
        name = found[1] or SHORT.get(found[2], found[2])
        if name in OWN:
            yield f"slurm.options.{number}: --{name} is set by the job's script or by another setting of [slurm]"
        elif name in ELSEWHERE:
            yield f"slurm.options.{number}: {found[0]} has no use here: miles-spmd slurm submits the job and returns"
