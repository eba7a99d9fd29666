"""What advantages and corrections are computed from: one whole rollout as plain arrays, checked once.

Shape suffixes: N samples in submission order, R rollouts, T tokens of one sample (its own length for each; entry t
belongs to token t). A *rollout* is one or more samples (siblings, for example the turns of a conversation) with one
reward; a *group* is all rollouts of one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

Arrays = list[np.ndarray]  # one [T] array per sample

_PER_TOKEN = ("old_log_probs", "rollout_log_probs", "ref_log_probs", "teacher_log_probs", "teacher_kl", "values")


@dataclass(frozen=True)
class RolloutTable:
    """The R rollouts of a batch; siblings are counted once."""

    rewards: np.ndarray  # float64 [R]
    group_ids: np.ndarray  # int [R]
    of_sample: np.ndarray  # int [N], which rollout each sample belongs to


@dataclass(frozen=True)
class RolloutBatch:
    """Raises ValueError, naming samples, for shapes that do not fit, rewards or per-token values of trained tokens that
    are not finite, and siblings that differ in reward or group: nothing of that is masked."""

    rewards: np.ndarray  # float64 [N]
    group_ids: np.ndarray  # int [N], equal for the samples of one prompt
    masks: Arrays  # 0/1 [T], 1 where the policy chose the token and it is trained
    rollout_ids: np.ndarray | None = None  # int [N], equal for siblings; None: every sample is a rollout of its own
    old_log_probs: Arrays | None = None  # [T], of the policy in the ratio's denominator
    rollout_log_probs: Arrays | None = None  # [T], as the engine reported them
    ref_log_probs: Arrays | None = None  # [T]
    teacher_log_probs: Arrays | None = None  # [T]
    teacher_kl: Arrays | None = None  # [T], KL(student || teacher) over a top-k set, instead of teacher_log_probs
    values: Arrays | None = None  # [T], the critic's value of the state before token t

    def __post_init__(self) -> None:
        n = len(self.rewards)
        for name in ("group_ids", "masks", "rollout_ids", *_PER_TOKEN):
            array = getattr(self, name)
            if array is not None and len(array) != n:
                raise ValueError(f"{name} has {len(array)} entries for {n} rewards")
        if not np.isfinite(self.rewards).all():
            raise ValueError(f"rewards of samples {_first(~np.isfinite(self.rewards))} are not finite")
        for name in _PER_TOKEN:
            if getattr(self, name) is not None:
                self._check_tokens(name)

    def _check_tokens(self, name: str) -> None:
        arrays = getattr(self, name)
        wrong = [a.shape != m.shape for a, m in zip(arrays, self.masks)]
        if any(wrong):
            raise ValueError(f"{name} of samples {_first(np.asarray(wrong))} have another shape than their masks")
        if not np.isfinite(flat(arrays)[flat(self.masks) > 0]).all():
            wrong = [not np.isfinite(a[m > 0]).all() for a, m in zip(arrays, self.masks)]
            raise ValueError(f"{name} of samples {_first(np.asarray(wrong))} are not finite on trained tokens")

    def required(self, name: str, why: str) -> Arrays:
        """The per-token arrays ``name``. Raises ValueError, saying ``why`` they are needed, if there are none."""
        arrays: Arrays | None = getattr(self, name)
        if arrays is None:
            raise ValueError(f"{why} needs {name} of every sample")
        return arrays

    @cached_property
    def rollouts(self) -> RolloutTable:
        ids = np.arange(len(self.rewards)) if self.rollout_ids is None else self.rollout_ids
        _, first_R, of_sample = np.unique(ids, return_index=True, return_inverse=True)
        for name in ("rewards", "group_ids"):
            values_N = np.asarray(getattr(self, name))
            different = values_N != values_N[first_R][of_sample]
            if different.any():
                raise ValueError(f"siblings differ in {name}: rollouts {_first(different, np.asarray(ids))}")
        return RolloutTable(
            np.asarray(self.rewards, np.float64)[first_R], np.asarray(self.group_ids)[first_R], of_sample
        )

    @property
    def fully_masked_samples(self) -> int:
        """Samples without a trained token. They get no gradient; their rewards still count in their group's baseline,
        as they do where DAPO masks over-long answers."""
        return sum(not mask.any() for mask in self.masks)


@dataclass(frozen=True)
class Estimate:
    """What an advantage estimator returns; arrays like the masks, 0 where they are."""

    advantages: Arrays  # [T]
    returns: Arrays | None = None  # [T], targets of the critic
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Correction:
    """What a correction returns. ``policy_weights`` multiply the policy term of each token, not its KL or entropy; 0
    rejects a token. Denominators do not change; see ``corrections``."""

    policy_weights: Arrays  # float32 [T]
    metrics: dict[str, float] = field(default_factory=dict)


def flat(arrays: Arrays) -> np.ndarray:
    """All tokens of all samples in order, float64."""
    return np.concatenate([np.zeros(0), *arrays])


def masked(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Float64 [T], 0 where the mask is, whatever stood there."""
    return np.where(mask > 0, values, np.float64(0))


def _first(wrong: np.ndarray, names: np.ndarray | None = None) -> list[int]:
    """At most eight of the places (or of their names) that are wrong."""
    places = np.flatnonzero(wrong)
    return list(dict.fromkeys((places if names is None else names[places]).tolist()))[:8]
