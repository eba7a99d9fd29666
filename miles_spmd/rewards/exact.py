"""Exact string match."""

from __future__ import annotations

from typing import Any


def normalise(text: str) -> str:
    """Remove leading and trailing white space, and make every other run of white space one blank. Case, punctuation
    and the spelling of numbers count."""
    return " ".join(text.split())


def exact(text: str, label: Any) -> float:
    """Return 1.0 if the whole answer equals the label, or one of a list of labels, after ``normalise``; else 0.0.

    A number is compared as Python writes it. Raises ValueError for a missing label.
    """
    labels = label if isinstance(label, list | tuple) else [label]
    if not labels or any(one is None or isinstance(one, dict) for one in labels):
        raise ValueError(f"the label {label!r} is neither a string, a number nor a list of these")
    return float(normalise(text) in {normalise(str(one)) for one in labels})
