"""A hook of the trainer that writes down its calls and the weights that it has seen."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch.distributed as dist

from miles_spmd.types.cell import CELL

if TYPE_CHECKING:
    from torch import Tensor


def note(phase: str, *, ends: bool, role: str, weights: Mapping[str, Tensor]) -> None:
    """The ranks of a cell write into another file than those of one world."""
    digest = hashlib.sha256(b"".join(weights[name].detach().numpy().tobytes() for name in sorted(weights)))
    place = os.environ.get(CELL, str(dist.get_rank())).replace("/", "of")
    with open(f"hook-{place}.txt", "a") as file:
        file.write(f"{phase} {'ends' if ends else 'begins'} {digest.hexdigest()[:16]}\n")
