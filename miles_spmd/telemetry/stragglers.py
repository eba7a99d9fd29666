"""The file with the time that each rank's own work takes, by phase: who is slow, as the report shows it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from miles_spmd.types.files import write_whole

STRAGGLERS_FILE = "stragglers.json"


class Row(msgspec.Struct, frozen=True):
    """One phase of the ranks that wait for each other within it: of one engine, or of one model replica."""

    phase: str
    ranks: list[int]
    hosts: list[str]
    devices: list[str]
    median: float  # seconds of a step
    longest: float  # seconds of a step
    ratio: float  # median over steps of its time per unit of work, relative to the median of its peers
    slow: bool  # a warning was printed


class Stragglers(msgspec.Struct, frozen=True):
    """Of the steps from ``first`` to ``last``."""

    first: int
    last: int
    rows: list[Row]  # the slowest of each phase first


def write_stragglers(run_dir: Path, stragglers: Stragglers) -> None:
    """Raises OSError."""
    write_whole(run_dir / STRAGGLERS_FILE, msgspec.json.encode(stragglers))


def read_stragglers(run_dir: Path) -> Stragglers | None:
    """Return what a run has written, None if nothing. Raises OSError, msgspec.DecodeError."""
    try:
        return msgspec.json.decode((run_dir / STRAGGLERS_FILE).read_bytes(), type=Stragglers)
    except FileNotFoundError:
        return None
