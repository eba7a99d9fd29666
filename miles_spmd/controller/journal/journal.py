"""The record of a run: every event reaches the metrics, the observers and the ledger from here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from miles_spmd.controller.journal.events import (
    Event,
    MetricsReported,
    PhaseFinished,
    PhaseStarted,
    RolloutFinished,
    StepFinished,
    UpdateFinished,
)
from miles_spmd.controller.journal.ledger import LedgerRecorder
from miles_spmd.controller.journal.metrics import Metrics
from miles_spmd.controller.journal.observers import Observer


class Journal:
    """Passes events on: first to the metrics, then to the observers in order, and last to the ledger, if any."""

    def __init__(self, metrics: Metrics, observers: Sequence[Observer], ledger: LedgerRecorder | None = None) -> None:
        self._metrics, self._observers, self._ledger = metrics, [metrics, *observers], ledger

    def publish(self, event: Event) -> None:
        for observer in self._observers:
            observer.observe(event)
        if self._ledger is None:
            return
        if isinstance(event, RolloutFinished | UpdateFinished | StepFinished):
            with self.timed("ledger"):  # digests of a whole batch take time, which has to show in the metrics
                self._ledger.observe(event)
        else:
            self._ledger.observe(event)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Show and time ``phase`` while the block runs, also when it raises."""
        self.publish(PhaseStarted(phase))
        started = time.monotonic()
        try:
            yield
        finally:
            self.publish(PhaseFinished(phase, time.monotonic() - started))

    def report(self, step: int) -> None:
        """Publish what was measured since the last report, ``step`` steps into the run."""
        self.publish(MetricsReported(step, self._metrics.take()))

    @property
    def ledger_head(self) -> str:
        """The hash of the ledger's last entry, which is on disk when this returns; "" without a ledger."""
        return "" if self._ledger is None else self._ledger.head
