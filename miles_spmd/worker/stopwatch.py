"""Where the time of one command went, by part."""

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
        began = time.perf_counter()
        yield
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """What was measured since the last call, in seconds."""
        taken, self._seconds = self._seconds, {}
        return taken
