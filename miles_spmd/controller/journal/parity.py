"""The parity check of every step: whether engine and trainer compute the same log-probs for the sampled tokens.

Parity is more than an observer: at ``parity_gate`` "stop" it ends the run, and at "mask" it removes the tokens that
differ from the loss. So the policy calls it, and its result decides what is trained.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec
import numpy as np

from miles_spmd.config import DeterminismConfig
from miles_spmd.controller.journal.metrics import mismatch_metrics
from miles_spmd.protocol.results import Bisection
from miles_spmd.types.rollout_batch import Arrays
from miles_spmd.types.sample import Sample
from miles_spmd.types.train_sequence import TrainSequence

log = logging.getLogger(__name__)

BUDGETED = {  # keys of determinism.mismatch_budget -> the metrics that they limit
    "mean": "train/train_rollout_logprob_abs_diff",
    "p999": "train/train_rollout_logprob_abs_diff_p999",
    "max": "train/train_rollout_logprob_abs_diff_max",
    "k3": "train/train_rollout_kl",
}


class ParityError(RuntimeError):
    """Engine and trainer differ by more than the run allows. The message names the first or worst token."""


class Parity:
    """Compares engine and trainer on tokens that both scored with the same weights, and applies ``parity_gate``."""

    def __init__(self, settings: DeterminismConfig, *, recorded: bool = False) -> None:
        """``recorded``: the samples come from a ledger, which does not keep the engine's top-1 tokens."""
        self.counts_flips = settings.counts_flips and not recorded
        self._exact, self._gate = settings.parity == "bitwise", settings.parity_gate or "stop"
        self._budget = settings.mismatch_budget
        self._sample_of: dict[int, Sample] = {}
        self._comparable: dict[int, np.ndarray] = {}  # of sequences that several versions have sampled, bool [T]
        self._warned = False
        self.checked = -1  # the last step whose log-probs were compared

    def begin_step(
        self, samples: Sequence[Sample], sequences: Sequence[TrainSequence], version: int | None = None
    ) -> None:
        """Remember the samples that this step's sequences were made of: errors name them, and they have the engine's
        top-1 tokens. Later calls may check any of these sequences. ``version``: of the engine's weights; tokens that
        others have sampled are not compared."""
        self._sample_of = {id(sequence): sample for sequence, sample in zip(sequences, samples, strict=True)}
        self._comparable = {
            id(sequence): of_version(sample, version)
            for sequence, sample in zip(sequences, samples, strict=True)
            if any(one != version for one, _ in sample.weight_versions)
        }

    def check(self, step: int, sequences: Sequence[TrainSequence], log_probs: Arrays) -> dict[str, float]:
        """Compare the engine's log-probs with ``log_probs``, float32 [T] per sequence, which come from the trainer's
        own forward pass with the weights that generated. Returns the metrics of all trained tokens.

        Where they differ by more than the run allows, raises ParityError, masks the tokens in ``sequences``, or logs a
        warning, as ``parity_gate`` says.
        """
        comparable = [self._of_version(sequence) for sequence in sequences]
        metrics = mismatch_metrics(comparable, log_probs)
        if not metrics:
            return {}
        self.checked = step
        gaps = [_gap(sequence, own) for sequence, own in zip(comparable, log_probs, strict=True)]
        differing = sum(int(np.count_nonzero(gap)) for gap in gaps)
        compared = _count_trained(comparable)  # before the gate masks some of them
        limits = [(name, limit) for name, limit in self._budget.items() if name in BUDGETED]
        over = {name: limit for name, limit in limits if metrics[BUDGETED[name]] > limit}
        if (self._exact and differing) or over:
            allowed = 0.0 if self._exact else self._budget.get("max", np.inf)
            found = "".join(f"; {name} is {metrics[BUDGETED[name]]:.3g}, allowed {over[name]:.3g}" for name in over)
            self._react(self._describe(step, sequences, log_probs, gaps, found), sequences, gaps, allowed)
        return metrics | {
            "parity/tokens": float(compared),
            "parity/mismatches": float(differing),
            "parity/max_abs_diff": max(float(gap.max(initial=0.0)) for gap in gaps),
        }

    def check_top1(self, step: int, sequences: Sequence[TrainSequence], top1: Arrays) -> dict[str, float]:
        """Compare the top-1 token at the position of every trained token, as :meth:`check` does log-probs. ``top1`` are
        the trainer's, int32 [T, 1] per sequence; the engine's came with the samples."""
        comparable = [self._of_version(sequence) for sequence in sequences]
        flips = [
            self._flips(self._sample_of[id(sequence)], one, own)
            for sequence, one, own in zip(sequences, comparable, top1, strict=True)
        ]
        if not (tokens := _count_trained(comparable)):
            return {}
        share = float(sum(map(np.sum, flips)) / tokens)
        if share > self._budget.get("top1_flips", np.inf):
            number = next(i for i, flip in enumerate(flips) if flip.any())
            sample, place = self._sample_of[id(sequences[number])], int(flips[number].argmax())
            what = (
                f"step {step}: the top-1 tokens of engine and trainer differ at {share:.3g} of {tokens} tokens, "
                f"allowed {self._budget['top1_flips']:.3g}; first: {_token(sample, place)}: "
                f"engine {sample.top1_ids[place - len(sample.trajectory.start)]}, "  # type: ignore[index]
                f"trainer {top1[number][place, 0]}; raise determinism.mismatch_budget or set determinism.parity_gate"
            )
            self._react(what, sequences, flips, 0.0)
        return {"train/train_rollout_top1_flips": share}

    @staticmethod
    def _flips(sample: Sample, sequence: TrainSequence, top1: np.ndarray) -> np.ndarray:
        """Return where a token is trained and the top-1 tokens differ, bool [T]."""
        if sample.top1_ids is None:
            raise ValueError(f"the engine returned no top-1 tokens for {sample.prompt.uid}, sample {sample.index}")
        engine = np.concatenate([np.asarray(sample.trajectory.start), np.asarray(sample.top1_ids)])
        return (sequence.loss_weights != 0) & (engine != top1[:, 0])

    def _of_version(self, sequence: TrainSequence) -> TrainSequence:
        """Return the sequence without a loss for tokens that cannot be compared."""
        comparable = self._comparable.get(id(sequence))
        if comparable is None:
            return sequence
        weights = np.where(comparable, sequence.loss_weights, np.float32(0))
        return msgspec.structs.replace(sequence, loss_weights=weights)

    def _react(self, what: str, sequences: Sequence[TrainSequence], gaps: Arrays, allowed: float) -> None:
        if self._gate == "stop":
            raise ParityError(what)
        if not self._warned:
            log.warning("%s (reported once; the metrics parity/* continue to count)", what)
            self._warned = True
        if self._gate == "mask":
            for sequence, gap in zip(sequences, gaps, strict=True):
                sequence.loss_weights = np.where(gap > allowed, 0, sequence.loss_weights).astype(np.float32)

    def _describe(
        self, step: int, sequences: Sequence[TrainSequence], log_probs: Arrays, gaps: Arrays, over_budget: str
    ) -> str:
        """Describe how much differs and where: first of all under bitwise parity, else where most."""
        largest = [float(gap.max(initial=0.0)) for gap in gaps]
        number = next(i for i, gap in enumerate(largest) if gap > 0) if self._exact else int(np.argmax(largest))
        place = int(np.flatnonzero(gaps[number])[0] if self._exact else np.argmax(gaps[number]))
        sequence, sample = sequences[number], self._sample_of[id(sequences[number])]
        differing, tokens = sum(map(np.count_nonzero, gaps)), _count_trained(sequences)
        return (
            f"step {step}: log-probs of engine and trainer differ on {differing} of {tokens} tokens "
            f"(max abs diff {max(largest):.3g}){over_budget}; {'first' if self._exact else 'largest'}: "
            f"{_token(sample, place)} (id {sequence.tokens[place]}): "
            f"engine {sequence.rollout_log_probs[place]:.9g}, trainer {log_probs[number][place]:.9g}; "  # type: ignore[index]
            "`miles-spmd bisect` names the operator"
        )


def of_version(sample: Sample, version: int | None) -> np.ndarray:
    """Return which tokens of a sample weights ``version`` have sampled, bool [T]."""
    found = [np.zeros(len(sample.trajectory.start), bool)]
    for segment in sample.trajectory.segments:
        spans = segment.weight_versions or [(-1, len(segment.tokens))]
        found += [np.full(count, one == version) for one, count in spans]
    return np.concatenate(found)


def first_difference(
    samples: Sequence[Sample], sequences: Sequence[TrainSequence], log_probs: Arrays
) -> tuple[Sample, int] | None:
    """Return the first sample with a token whose log-probs differ, and the position of that token in its sequence."""
    for sample, sequence, own in zip(samples, sequences, log_probs, strict=True):
        if (gap := _gap(sequence, own)).any():
            return sample, int(np.flatnonzero(gap)[0])
    return None


def describe_bisection(step: int, sample: Sample, place: int, bisections: Sequence[Bisection]) -> str:
    """Return in words what the ranks have found, each in its part of the model."""
    where = f"step {step}, {_token(sample, place)}"
    _, segment = sample.trajectory.turn_at(place)
    if any(b.response[: len(segment.tokens)] != segment.tokens for b in bisections):
        return f"{where}: alone, the engine generates another response than in the batch: it is not batch invariant"
    named = [b for b in bisections if b.operator]
    if not named:
        return f"{where}: all operators agree up to the final norm; the output layer or its softmax differs"
    first = min(named, key=lambda b: b.order)
    return f"{where}: the first operator that differs is {first.operator}; its output {first.what}"


def _token(sample: Sample, place: int) -> str:
    token, role = place - len(sample.trajectory.start), f", role {sample.role}" if sample.role else ""
    return f"prompt {sample.prompt.uid}, sample {sample.index}{role}, token {token} of the response"


def _count_trained(sequences: Sequence[TrainSequence]) -> int:
    return sum(int(np.count_nonzero(sequence.loss_weights)) for sequence in sequences)


def _gap(sequence: TrainSequence, log_probs: np.ndarray) -> np.ndarray:
    """Return |trainer - engine| of every token, [T]; 0 where none is trained."""
    if sequence.rollout_log_probs is None:
        raise ValueError("a sequence without the engine's log-probs cannot be compared")
    return np.where(sequence.loss_weights != 0, np.abs(log_probs - sequence.rollout_log_probs), 0)
