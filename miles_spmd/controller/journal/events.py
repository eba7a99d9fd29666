"""What happens in a run, as the values that the journal passes to its observers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from miles_spmd.ledger.entries import Saved
from miles_spmd.protocol.results import RefitResult, TrainResult
from miles_spmd.types.engine_group import POLICY
from miles_spmd.types.role import Role
from miles_spmd.types.rollout_batch import Arrays
from miles_spmd.types.sample import Sample
from miles_spmd.types.train_sequence import TrainSequence

Groups = Sequence[Sequence[Sample]]  # the samples of each prompt, in the order of submission


class Event(msgspec.Struct, frozen=True):
    """Something that happened in a run."""


class PhaseStarted(Event, frozen=True):
    """``step`` is that of the commands to the ranks: the number of the rollout, or of the steps that are done."""

    phase: str  # one of telemetry.metrics.PHASES
    step: int


class PhaseFinished(Event, frozen=True):
    """A phase ended, also when it raised an exception. The seconds of one phase are summed over a step."""

    phase: str
    seconds: float


class RanksReady(Event, frozen=True):
    """Every rank is built, ``seconds`` after the attempt began. ``by_rank``: the seconds of the parts of its start."""

    seconds: float
    by_rank: Sequence[Mapping[str, float]]


class RolloutFinished(Event, frozen=True):
    """All samples of a step are generated and scored."""

    step: int
    groups: Groups
    dropped: int  # groups that the filter rejected, or whose environment failed
    failures: Mapping[str, int] = {}  # of environments, by kind
    prefix_hits: float | None = None  # share of the prompts' tokens whose keys and values the engine had already
    sessions: int | None = None  # the most of them that ran at the same time, where they have several turns
    from_disk: int | None = None  # responses that an attempt before has left; None where none are kept


class Measured(Event, frozen=True):
    """Engine and trainer were compared, or a rollout was cut into optimizer steps, with metrics of its advantages and
    corrections."""

    step: int
    metrics: Mapping[str, float]


class BatchStarted(Event, frozen=True):
    """Training on the batch of one optimizer step begins, of the critic and the actor where there are both."""

    step: int
    tokens: int


class UpdateFinished(Event, frozen=True):
    """One optimizer step of one model. Metrics with the same name are averaged over the updates of a step."""

    step: int
    role: Role
    batch: Sequence[TrainSequence]
    results: Sequence[TrainResult]  # of every trainer rank
    log_probs: Arrays  # before the update, float32 [T] per sequence; values of a critic
    metrics: Mapping[str, float]
    policy: str = POLICY  # whose model it is


class EngineRefitted(Event, frozen=True):
    """The engine has the trainer's weights."""

    version: int
    results: Sequence[RefitResult]


class EvaluationFinished(Event, frozen=True):
    """The held-out sets were scored after ``step`` steps."""

    step: int
    metrics: Mapping[str, float]
    samples: Mapping[str, Groups]  # by set; empty where pairs are compared and nothing is generated


class CheckpointTaken(Event, frozen=True):
    """Every rank has its share of the checkpoint before ``step``, which the configuration asks for, in host memory."""

    step: int
    entry: Saved | None  # its digests; None without a ledger


class CheckpointCompleted(Event, frozen=True):
    """The checkpoint before ``step`` is on disk, after ``seconds`` of writing beside the training."""

    step: int
    seconds: float
    nbytes: int


class CheckpointFailed(Event, frozen=True):
    """The checkpoint before ``step`` could not be written."""

    step: int
    problem: str


class StepFinished(Event, frozen=True):
    """The samples and updates of ``step`` are complete."""

    step: int


class MetricsReported(Event, frozen=True):
    """Everything measured since the last report, after ``step`` steps."""

    step: int
    metrics: Mapping[str, float]
