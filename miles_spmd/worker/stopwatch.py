"""The time of one command, by part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """``with watch("engine"): ...`` adds to the seconds of that part."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the block's time, also when it raises: a command that fails late is reported with its time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken
