"""The time of this rank's own work, of its device on a GPU."""

from __future__ import annotations

import time
from typing import Any

import torch


class WorkClock:
    """Sums the seconds between :meth:`start` and :meth:`stop`. On a GPU these are the device's: the host only records
    events in the current stream, and does not wait."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begun: Any = None
        self._spans: list[tuple[Any, Any]] = []

    def start(self) -> None:
        self._begun = self._now()

    def stop(self) -> None:
        """End the present span. Does nothing where none was started since the last call."""
        if self._begun is not None:
            self._spans.append((self._begun, self._now()))
            self._begun = None

    def take(self) -> float:
        """Return the seconds since the last call. Waits until the device has come to the last :meth:`stop`."""
        spans, self._spans = self._spans, []
        if spans and self._cuda:
            spans[-1][1].synchronize()
            return sum(begin.elapsed_time(end) for begin, end in spans) / 1000
        return float(sum(end - begin for begin, end in spans))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
