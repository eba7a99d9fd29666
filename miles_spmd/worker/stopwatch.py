"""The time of one command, by part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """``with watch("engine"): ...`` adds to the seconds of that part."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._times: dict[str, int] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the block's time, also when it raises: a command that fails late is reported with its time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - began
            self._times[part] = self._times.get(part, 0) + 1

    def of(self, part: str) -> tuple[float, int]:
        """Return the seconds of ``part`` and how often it was entered, since :meth:`take`."""
        return self._seconds.get(part, 0.0), self._times.get(part, 0)

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since the last call."""
        taken, self._seconds, self._times = self._seconds, {}, {}
        return taken
