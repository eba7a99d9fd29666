"""The check of every step: are the log-probs that the engine gave its tokens those that the trainer gives them?"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from miles_spmd.config import DeterminismConfig
from miles_spmd.controller.journal.metrics import mismatch_metrics
from miles_spmd.protocol.results import Bisection
from miles_spmd.types.rollout_batch import Arrays
from miles_spmd.types.sample import Sample
from miles_spmd.types.train_sequence import TrainSequence

log = logging.getLogger(__name__)

BUDGETED = {  # the names of a budget -> those of the metrics
    "mean": "train/train_rollout_logprob_abs_diff",
    "p999": "train/train_rollout_logprob_abs_diff_p999",
    "max": "train/train_rollout_logprob_abs_diff_max",
    "k3": "train/train_rollout_kl",
}


class ParityError(RuntimeError):
    """Engine and trainer differ by more than the run allows; says where first."""


class Parity:
    """Compares log-probs of tokens whose weights engine and trainer share, and does what ``parity_gate`` says."""

    def __init__(self, settings: DeterminismConfig) -> None:
        self._exact, self._gate = settings.parity == "bitwise", settings.parity_gate or "stop"
        self._budget = settings.mismatch_budget
        self._sample_of: dict[int, Sample] = {}
        self._warned = False

    def expect(self, samples: Sequence[Sample], sequences: Sequence[TrainSequence]) -> None:
        """The samples of this step, and their sequences, of which any may be checked later."""
        self._sample_of = {id(sequence): sample for sequence, sample in zip(sequences, samples, strict=True)}

    def check(self, step: int, sequences: Sequence[TrainSequence], log_probs: Arrays) -> dict[str, float]:
        """Metrics of all trained tokens. Masks them out of ``sequences``, or raises ParityError, as the gate says.

        ``log_probs`` come from the trainer's own forward pass with the weights that generated.
        """
        found = mismatch_metrics(sequences, log_probs)
        if not found:
            return {}
        gaps = [_gap(sequence, own) for sequence, own in zip(sequences, log_probs, strict=True)]
        differing = sum(int(np.count_nonzero(gap)) for gap in gaps)
        metrics = {
            "parity/tokens": float(_trained(sequences)),
            "parity/mismatches": float(differing),
            "parity/max_abs_diff": max(float(gap.max(initial=0.0)) for gap in gaps),
        }
        bounds: dict[str, float] = {name: limit for name, limit in self._budget.items() if name in BUDGETED}
        over = {name: limit for name, limit in bounds.items() if found[BUDGETED[name]] > limit}
        if (self._exact and differing) or over:
            allowed = 0.0 if self._exact else self._budget.get("max", np.inf)
            self._react(self._describe(step, sequences, log_probs, gaps, found, over), sequences, gaps, allowed)
        return found | metrics

    def check_top1(self, step: int, sequences: Sequence[TrainSequence], top1: Arrays) -> dict[str, float]:
        """As :meth:`check`, of the most likely token in the place of every trained one: the trainer's are ``top1``
        [T, 1], the engine's came with the samples."""
        flips = [self._flips(sequence, own) for sequence, own in zip(sequences, top1, strict=True)]
        if not (tokens := _trained(sequences)):
            return {}
        share = float(sum(map(np.sum, flips)) / tokens)
        if share > self._budget.get("top1_flips", np.inf):
            number = next(i for i, flip in enumerate(flips) if flip.any())
            sample, place = self._sample_of[id(sequences[number])], int(flips[number].argmax())
            what = (
                f"step {step}: in the place of {share:.3g} of {tokens} tokens engine and trainer find another one most "
                f"likely, allowed {self._budget['top1_flips']:.3g}; first: {_token(sample, place)}: "
                f"engine {sample.top1_ids[place - len(sample.prompt.tokens)]}, "  # type: ignore[index]
                f"trainer {top1[number][place, 0]}"
            )
            self._react(what, sequences, flips, 0.0)
        return {"train/train_rollout_top1_flips": share}

    def _flips(self, sequence: TrainSequence, top1: np.ndarray) -> np.ndarray:
        """bool [T]: where a token is trained and another one most likely."""
        sample = self._sample_of[id(sequence)]
        if sample.top1_ids is None:
            raise ValueError(f"the engine returned no top-1 tokens for {sample.prompt.uid}, sample {sample.index}")
        engine = np.concatenate([np.asarray(sample.prompt.tokens), np.asarray(sample.top1_ids)])
        return (sequence.loss_weights != 0) & (engine != top1[:, 0])

    def _react(self, what: str, sequences: Sequence[TrainSequence], gaps: Arrays, allowed: float) -> None:
        if self._gate == "stop":
            raise ParityError(what)
        if not self._warned:
            log.warning("%s (said once; the metrics parity/* count on)", what)
            self._warned = True
        if self._gate == "mask":
            for sequence, gap in zip(sequences, gaps, strict=True):
                sequence.loss_weights = np.where(gap > allowed, 0, sequence.loss_weights).astype(np.float32)

    def first(self, sequences: Sequence[TrainSequence], log_probs: Arrays) -> tuple[Sample, int] | None:
        """The first sample with a token whose log-probs differ, and that token's place in its sequence."""
        for sequence, own in zip(sequences, log_probs, strict=True):
            if (gap := _gap(sequence, own)).any():
                return self._sample_of[id(sequence)], int(np.flatnonzero(gap)[0])
        return None

    def _describe(
        self,
        step: int,
        sequences: Sequence[TrainSequence],
        log_probs: Arrays,
        gaps: Arrays,
        found: dict[str, float],
        over: dict[str, float],
    ) -> str:
        """How much differs, and where: first of all; without bitwise parity, most of all."""
        largest = [float(gap.max(initial=0.0)) for gap in gaps]
        number = next(i for i, gap in enumerate(largest) if gap > 0) if self._exact else int(np.argmax(largest))
        place = int(np.flatnonzero(gaps[number])[0] if self._exact else np.argmax(gaps[number]))
        sequence, sample = sequences[number], self._sample_of[id(sequences[number])]
        differing, tokens = sum(map(np.count_nonzero, gaps)), _trained(sequences)
        budget = "".join(
            f"; {name} is {found[BUDGETED[name]]:.3g}, allowed {limit:.3g}" for name, limit in over.items()
        )
        return (
            f"step {step}: engine and trainer give {differing} of {tokens} tokens other log-probs, by up to "
            f"{max(largest):.3g}{budget}; {'first' if self._exact else 'largest'}: "
            f"{_token(sample, place)} (id {sequence.tokens[place]}): "
            f"engine {sequence.rollout_log_probs[place]:.9g}, trainer {log_probs[number][place]:.9g}; "  # type: ignore[index]
            "`miles-spmd bisect` names the operator"
        )


def _token(sample: Sample, place: int) -> str:
    return f"prompt {sample.prompt.uid}, sample {sample.index}, token {place - len(sample.prompt.tokens)} of the answer"


def _trained(sequences: Sequence[TrainSequence]) -> int:
    return sum(int(np.count_nonzero(sequence.loss_weights)) for sequence in sequences)


def _gap(sequence: TrainSequence, log_probs: np.ndarray) -> np.ndarray:
    """Of every token; 0 where none is trained."""
    if sequence.rollout_log_probs is None:
        raise ValueError("a sequence without the engine's log-probs has nothing to be compared with")
    return np.where(sequence.loss_weights != 0, np.abs(log_probs - sequence.rollout_log_probs), 0)


def describe_bisection(step: int, sample: Sample, place: int, bisections: Sequence[Bisection]) -> str:
    """What the ranks have found, each in its part of the model."""
    where = f"step {step}, {_token(sample, place)}"
    if any(b.response[: len(sample.response)] != sample.response for b in bisections):
        return f"{where}: the engine gives another answer alone than it gave among others, so it depends on the batch"
    named = [b for b in bisections if b.operator]
    if not named:
        return f"{where}: all operators agree, up to the final norm; what differs is the output layer or its softmax"
    first = min(named, key=lambda b: b.order)
    return f"{where}: the first operator to differ is {first.operator}; its output {first.what}"
