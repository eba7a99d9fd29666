"""What can happen to a file. ``other`` is another file, for damages that have one."""

from __future__ import annotations

import random
from pathlib import Path


def flip(path: Path, other: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, other: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def swap(path: Path, other: Path, rng: random.Random) -> None:
    ours = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(ours)


def delete(path: Path, other: Path, rng: random.Random) -> None:
    path.unlink()


def blank(path: Path, other: Path, rng: random.Random) -> None:
    """A block that was allocated and never written."""
    content = path.read_bytes()
    start = rng.randrange(len(content))
    path.write_bytes(content[:start] + bytes(len(content[start : start + 512])) + content[start + 512 :])
