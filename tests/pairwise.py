"""Fewer cases than a product of dimensions: any two values of two dimensions meet in at least one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

Case = tuple[Any, ...]


def pairs(case: Case) -> set[tuple[tuple[int, Any], tuple[int, Any]]]:
    """The (dimension, value) pairs that meet in ``case``."""
    return set(itertools.combinations(enumerate(case), 2))


def pairwise(cases: Sequence[Case]) -> list[Case]:
    """Choose from ``cases``, always the one with the most pairs that are not yet covered and the first of several,
    until the chosen ones cover every pair that is in ``cases``."""
    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return chosen
