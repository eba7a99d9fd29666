"""Observers of a run's events that write for people: metrics files, the progress display, transcripts."""

from __future__ import annotations

from typing import Protocol

from miles_spmd.config import Config
from miles_spmd.controller.journal.events import (
    EvaluationFinished,
    Event,
    MetricsReported,
    PhaseFinished,
    PhaseStarted,
    RolloutFinished,
)
from miles_spmd.telemetry.progress import Progress
from miles_spmd.telemetry.trackers import Trackers
from miles_spmd.telemetry.transcripts import write_rollout, write_transcripts


class Observer(Protocol):
    def observe(self, event: Event) -> None:
        """Take note of ``event``, or ignore it."""


class TrackerObserver:
    """Writes the reported metrics to metrics.jsonl, TensorBoard and Weights & Biases."""

    def __init__(self, trackers: Trackers) -> None:
        self._trackers = trackers

    def observe(self, event: Event) -> None:
        if isinstance(event, MetricsReported):
            self._trackers.log(event.step, event.metrics)


class ProgressObserver:
    """Shows the phase that the run is in, and the newest metrics."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def observe(self, event: Event) -> None:
        match event:
            case PhaseStarted(phase):
                self._progress.phase(phase)
            case PhaseFinished():
                self._progress.phase("")
            case MetricsReported(step, metrics):
                self._progress.update(step, metrics)


class TranscriptObserver:
    """Writes some responses of each evaluation to transcripts.jsonl, and the best and worst one of each training step,
    with its rewards, to rollouts.jsonl."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def observe(self, event: Event) -> None:
        match event:
            case EvaluationFinished() if event.samples:
                write_transcripts(self._config, event.step, event.samples)
            case RolloutFinished():
                write_rollout(self._config, event.step + 1, event.groups)
