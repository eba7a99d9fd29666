"""What runs of recipes need in tests."""

from __future__ import annotations

from miles_spmd.types.sample import Sample


def coin(sample: Sample) -> float:
    """A reward that differs within groups, whatever the model answers."""
    return float(sum(sample.response) % 2)
