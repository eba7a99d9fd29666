"""A reward function that does at a certain step what a file says."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from miles_spmd.types.sample import Sample


def obedient(sample: Sample) -> float:
    """The file ``deed``, beside the one that the environment names, has what to do and after how many steps."""
    held = Path(os.environ["HELD_FILE"])
    deed, step = held.with_name("deed").read_text().split()
    metrics = held.parent / "runs" / "tiny" / "metrics.jsonl"
    if deed != "nothing" and json.loads(metrics.read_text().splitlines()[-1])["step"] == int(step):
        if deed == "raise":
            raise ValueError("this reward fails here")
        held.touch()
        time.sleep(600)
    return float(len(sample.response) % 2)
