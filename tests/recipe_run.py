"""What a process does that runs a recipe for a test."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from miles_spmd.cli import main
from miles_spmd.types.sample import Sample


def train(folder: Path, arguments: list[str], cpu: int, port: int, messages: Path) -> None:
    """``miles-spmd train`` in ``folder``, as the only rank of its world and on one core. Exits with its status."""
    os.chdir(folder)
    os.sched_setaffinity(0, [cpu])  # several threads, as the worker would start, wait for each other on a busy machine
    descriptor = os.open(messages, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parents[1]))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    sys.argv = ["miles-spmd", "train", *arguments]
    main()


def coin(sample: Sample) -> float:
    """A reward that differs within groups, whatever the model answers."""
    return float(sum(sample.response) % 2)
