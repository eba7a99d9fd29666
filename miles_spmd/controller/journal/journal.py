"""The record of a run: every event reaches the metrics, the observers and the ledger from here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol

from miles_spmd.config import Config
from miles_spmd.controller.attempts import AttemptWriter
from miles_spmd.controller.journal import events
from miles_spmd.controller.journal.ledger import LedgerRecorder
from miles_spmd.controller.journal.metrics import Metrics
from miles_spmd.ledger.entries import Saved
from miles_spmd.protocol.results import CheckpointResult
from miles_spmd.telemetry import texts
from miles_spmd.telemetry.progress import Progress
from miles_spmd.telemetry.trackers import Trackers
from miles_spmd.telemetry.transcripts import write_rollout, write_transcripts


class Observer(Protocol):
    def observe(self, event: events.Event) -> None:
        """Take note of ``event``, or ignore it."""


class Writers:
    """Observes a run for people: metrics go to the trackers, phase and metrics to the progress display and to what
    those see who are not at the run's terminal, and responses to files: some of each evaluation, and the best and the
    worst one of each training step."""

    def __init__(
        self, config: Config, trackers: Trackers, progress: Progress, attempt: AttemptWriter, lines: texts.StepLines
    ) -> None:
        self._config, self._trackers, self._progress = config, trackers, progress
        self._attempt, self._lines = attempt, lines

    def observe(self, event: events.Event) -> None:
        match event:
            case events.PhaseStarted(phase, _):
                self._progress.phase(phase)
                self._attempt.phase(phase)
            case events.PhaseFinished():
                self._progress.phase("")
                self._attempt.phase("")
            case events.RanksReady(seconds, by_rank):
                self._progress.tell(texts.start(by_rank, seconds))
                self._attempt.tell(f"{self._lines.name}: {texts.start(by_rank, seconds)}")
            case events.MetricsReported(step, metrics):
                self._trackers.log(step, metrics)
                self._progress.update(step, metrics)
                self._attempt.step(step)
                self._attempt.tell(self._lines.line(step, metrics))
            case events.CheckpointCompleted(step):
                self._attempt.tell(f"{self._lines.name}: checkpoint after {step} steps")
            case events.CheckpointFailed(_, problem):
                self._attempt.tell(f"{self._lines.name}: {problem}")
            case events.EvaluationFinished(step, _, samples) if samples:
                write_transcripts(self._config, step, samples)
            case events.RolloutFinished(step, groups):
                write_rollout(self._config, step + 1, groups)


class Journal:
    """Passes events on: first to the metrics, then to the observers in order, and last to the ledger, if any."""

    def __init__(self, metrics: Metrics, observers: Sequence[Observer], ledger: LedgerRecorder | None = None) -> None:
        self._metrics, self._observers, self.ledger = metrics, [metrics, *observers], ledger

    def publish(self, event: events.Event) -> None:
        for observer in self._observers:
            observer.observe(event)
        if self.ledger is not None:
            # digests of a whole batch take time, which has to show in the metrics
            long = events.RolloutFinished | events.UpdateFinished | events.StepFinished
            with self.timed("ledger", event.step) if isinstance(event, long) else nullcontext():
                self.ledger.observe(event)

    @contextmanager
    def timed(self, phase: str, step: int) -> Iterator[None]:
        """Show and time ``phase`` of ``step`` while the block runs, also when it raises."""
        self.publish(events.PhaseStarted(phase, step))
        started = time.monotonic()
        try:
            yield
        finally:
            self.publish(events.PhaseFinished(phase, time.monotonic() - started))

    def report(self, step: int) -> None:
        """Publish what was measured since the last report, ``step`` steps into the run."""
        self.publish(events.MetricsReported(step, self._metrics.take(step)))

    @property
    def ledger_head(self) -> str:
        """The hash of the ledger's last entry; "" without a ledger."""
        return "" if self.ledger is None else self.ledger.head

    def checkpoint_entry(self, step: int, results: Mapping[str, Sequence[CheckpointResult]]) -> Saved | None:
        """Return the digests of a checkpoint before ``step`` as the ledger has them; None without a ledger."""
        return None if self.ledger is None else self.ledger.saved(step, results)

    def sync(self) -> None:
        """Return when the ledger's entries so far, and the data of their steps, are on disk."""
        if self.ledger is not None:
            self.ledger.sync()
