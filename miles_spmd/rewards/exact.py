"""Exact string match."""

from __future__ import annotations

from typing import Any

from miles_spmd.rewards.labels import exact_labels


def normalise(text: str) -> str:
    """Remove leading and trailing white space, and make every other run of white space one blank. Case, punctuation
    and the spelling of numbers count."""
    return " ".join(text.split())


def exact(text: str, label: Any) -> float:
    """Return 1.0 if the whole answer equals the label, or one of a list of labels, after ``normalise``; else 0.0.

    A number is compared as Python writes it. Raises ValueError for a missing label.
    """
    return float(normalise(text) in map(normalise, exact_labels(label)))
