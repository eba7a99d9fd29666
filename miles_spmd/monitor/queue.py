"""What Slurm's queue says about a run's job."""

from __future__ import annotations

import re
import shutil
import subprocess

import msgspec

SECONDS = 3.0  # for Slurm to reply


class Queued(msgspec.Struct, frozen=True):
    """A job that waits or runs."""

    state: str
    reason: str
    start: str  # actual or expected, "N/A" where Slurm does not know


def queued(job: str) -> Queued | None:
    """Return what the queue says about ``job``; None without such a queue, and for a job that is over."""
    if not re.fullmatch(r"\d+(_\d+)?", job, re.ASCII) or shutil.which("squeue") is None:
        return None
    command = ["squeue", "-h", "-j", job, "-o", "%T|%r|%S"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    fields = done.stdout.strip().partition("\n")[0].split("|")
    return Queued(*fields) if done.returncode == 0 and len(fields) == 3 else None
