"""Folders of random models, outside of a run."""

from __future__ import annotations

from pathlib import Path

from miles_spmd.models.random import random_config, resolve, write_random_checkpoint


def random_checkpoint(name: str, cache: Path | None = None) -> Path:
    """Write ``random:SHAPE`` or ``random:SHAPE/LAYERS`` into a folder below ``cache`` (default: the user's) and return
    the folder. Raises ValueError naming the known shapes, OSError."""
    place = resolve(Path(name))
    config = random_config(place)
    assert config is not None, name
    folder = (cache or place.parent) / place.name
    write_random_checkpoint(folder, config)
    return folder
