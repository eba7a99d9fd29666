"""What settings may not say together, one small function per rule: algorithm_rules, layout_rules, parity_rules, ...

A rule's parameters are leaf names of our tables or keys of `[megatron]` and `[sglang]` (leaf names are unique), or
``shape`` (the checkpoint's config.json), or ``world_size`` and how much of it trains and generates, ``trainer_ranks``
and ``engine_ranks``, or ``capabilities`` (compute capabilities of the GPUs here, "9.0"; none on a CPU). A rule is left
out when one of them is unknown or faulty. It yields messages that begin with the setting to change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Rule = Callable[..., Iterator[str]]
CONTRADICTIONS: list[Rule] = []  # why a configuration cannot run
PARITY: list[Rule] = []  # why engine and trainer cannot give a token the same log-prob to the bit
NOT_BY_DEFAULT: list[Rule] = []  # why "auto" does without such parity where it could be had
DOUBTS: list[Rule] = []  # what is allowed but probably not meant
FILES: list[Rule] = []  # what is not there


def rule(kind: list[Rule]) -> Callable[[Rule], Rule]:
    """Makes the function a rule of this kind."""

    def register(function: Rule) -> Rule:
        kind.append(function)
        return function

    return register


def checkpoint_shape(folder: Path) -> dict[str, Any] | None:
    """The checkpoint's config.json, or None where there is none to read."""
    try:
        shape = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return shape if isinstance(shape, dict) else None
