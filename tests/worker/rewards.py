"""Reward functions for runs that fail or learn nothing."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from miles_spmd.types.sample import Sample


def hangs(sample: Sample) -> float:
    """Says so in the file named by the environment."""
    scratch = Path(os.environ["HELD_FILE"] + f".{os.getpid()}")
    scratch.write_text(str(os.getpid()))
    scratch.rename(os.environ["HELD_FILE"])
    time.sleep(600)
    return 0.0


def constant(sample: Sample) -> float:
    return 0.7


def not_a_number(sample: Sample) -> float:
    return float("nan")


def raises(sample: Sample) -> float:
    raise KeyError("no such answer")


def by_length(sample: Sample) -> float:
    """Differs within a group, whatever was said."""
    return float(sum(sample.response) % 7) + 0.1 * sample.index


def by_length_slowly(sample: Sample) -> float:
    """Takes a while as long as there is the file that the environment names."""
    if Path(os.environ.get("SLOWLY", "absent")).exists():
        time.sleep(0.5)
    return by_length(sample)


def exits(sample: Sample) -> float:
    sys.exit(1)


def filter_that_exits(group: list[Sample]) -> bool:
    sys.exit(0)


def filter_that_hangs(group: list[Sample]) -> bool:
    time.sleep(600)
    return True


def length_and_parity(sample: Sample) -> dict[str, float]:
    return {"score": float(len(sample.response)), "odd": sum(sample.response) % 2}


def plug_in_that_raises(*given: Any, **named: Any) -> None:
    raise KeyError("gone")
