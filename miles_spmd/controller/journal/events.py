"""What happens in a run, as the values that the journal passes to its observers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from miles_spmd.protocol.results import CheckpointResult, RefitResult, TrainResult
from miles_spmd.types.role import Role
from miles_spmd.types.rollout_batch import Arrays
from miles_spmd.types.sample import Sample
from miles_spmd.types.train_sequence import TrainSequence

Groups = Sequence[Sequence[Sample]]  # the samples of each prompt, in the order of submission


class Event:
    """Something that happened in a run."""


@dataclass(frozen=True)
class PhaseStarted(Event):
    phase: str  # one of telemetry.metrics.PHASES


@dataclass(frozen=True)
class PhaseFinished(Event):
    """A phase ended, also when it raised an exception. The seconds of one phase are summed over a step."""

    phase: str
    seconds: float


@dataclass(frozen=True)
class RolloutFinished(Event):
    """All samples of a step are generated and scored."""

    step: int
    groups: Groups
    dropped: int  # groups that the filter rejected


@dataclass(frozen=True)
class ParityChecked(Event):
    """The outputs of engine and trainer were compared."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class AdvantagesComputed(Event):
    """A rollout was cut into optimizer steps, with the metrics of its advantages and corrections."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class BatchStarted(Event):
    """Training on the batch of one optimizer step begins, of the critic and the actor where there are both."""

    step: int
    tokens: int


@dataclass(frozen=True)
class UpdateFinished(Event):
    """One optimizer step of one model. Metrics with the same name are averaged over the updates of a step."""

    step: int
    role: Role
    batch: Sequence[TrainSequence]
    results: Sequence[TrainResult]  # of every trainer rank
    log_probs: Arrays  # before the update, float32 [T] per sequence; values of a critic
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class EngineRefitted(Event):
    """The engine has the trainer's weights."""

    version: int
    results: Sequence[RefitResult]


@dataclass(frozen=True)
class EvaluationFinished(Event):
    """The held-out sets were scored after ``step`` steps."""

    step: int
    metrics: Mapping[str, float]
    samples: Mapping[str, Groups]  # by set; empty where pairs are compared and nothing is generated


@dataclass(frozen=True)
class CheckpointWritten(Event):
    """Every rank has written its share of the checkpoint before ``step``."""

    step: int
    results: Sequence[CheckpointResult]


@dataclass(frozen=True)
class StepFinished(Event):
    """The samples and updates of ``step`` are complete."""

    step: int


@dataclass(frozen=True)
class MetricsReported(Event):
    """Everything measured since the last report, after ``step`` steps."""

    step: int
    metrics: Mapping[str, float]
