"""The plug points around a run: what is done before and after its phases, with its metrics, and with what it exports.

They run on the controller, in its main thread: the run waits for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from miles_spmd.config import Config
from miles_spmd.types.sample import Sample


class Moment(msgspec.Struct, frozen=True):
    """The beginning or the end of a phase."""

    phase: str  # start, rollout, log_probs, train, refit, eval, save or ledger
    step: int  # the step that the phase belongs to; of an evaluation and a save, the number of steps that are done
    ends: bool = False
    seconds: float = 0.0  # that it took, at its end
    groups: Sequence[Sequence[Sample]] = ()  # the samples of the newest rollout by prompt, with rewards


class PhaseHook(Protocol):
    """``run.phase_hook``: is called before and after each phase; of one that fails or is left, only before."""

    def __call__(self, moment: Moment) -> None: ...


class Evaluator(Protocol):
    """``eval.evaluator``: computes further metrics of each evaluation of a held-out set."""

    def __call__(self, name: str, groups: Sequence[Sequence[Sample]]) -> Mapping[str, float]:
        """Return metrics of the set ``name``: KEY becomes ``eval/NAME-KEY``. ``groups`` has the samples of each prompt,
        with rewards."""
        ...


class Tracker(Protocol):
    """Receives the metrics of a run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` after ``step`` steps (0: before the first). May be called more than once for a step."""

    def rewind(self, step: int) -> None:
        """Forget what was recorded after later steps than ``step``, from where the run goes on."""

    def close(self) -> None:
        """Write what is not written yet."""


class TrackerFactory(Protocol):
    """``telemetry.tracker``: makes a tracker beside those that come with the project. A class whose constructor takes
    the configuration is one, too."""

    def __call__(self, config: Config) -> Tracker: ...


class Exporter(Protocol):
    """``checkpoint.exporter``: does something with a Hugging Face checkpoint that is complete, such as uploading or
    converting it. What it raises ends the run with an error, after everything is written."""

    def __call__(self, folder: Path, step: int) -> None:
        """``folder`` has the model after ``step`` steps."""
        ...
