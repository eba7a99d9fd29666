"""The input of advantages and corrections: all samples of a step as plain arrays, checked once.

Shape suffixes: N samples in submission order, R rollouts, T tokens of one sample (each sample has its own length; entry
t belongs to token t). A *rollout* is one or more samples (siblings, for example the turns of a conversation) with one
reward; a *group* is all rollouts of one prompt and one role.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

Arrays = list[np.ndarray]  # one [T] array per sample
Baselines = Mapping[str, Mapping[str, float]]  # a number for each game and role

_PER_TOKEN = ("old_log_probs", "rollout_log_probs", "ref_log_probs", "teacher_log_probs", "teacher_kl", "values")


@dataclass(frozen=True)
class RolloutTable:
    """The R rollouts of a batch, each once, however many samples it has."""

    rewards: np.ndarray  # float64 [R]
    group_ids: np.ndarray  # int [R]
    of_sample: np.ndarray  # int [N], the rollout of each sample
    first: np.ndarray  # int [R], the first sample of each rollout


@dataclass(frozen=True)
class RolloutBatch:
    """All samples of a step.

    Raises ValueError, naming the samples, if shapes do not match, if rewards or values of trained tokens are not
    finite, and if siblings differ in reward or group: such samples are never masked silently.
    """

    rewards: np.ndarray  # float64 [N]
    group_ids: np.ndarray  # int [N], equal for the samples of one prompt and role
    masks: Arrays  # 0/1 [T], 1 where the policy sampled the token and it is trained
    rollout_ids: np.ndarray | None = None  # int [N], equal for siblings; None: each sample is a rollout
    old_log_probs: Arrays | None = None  # [T], of the policy in the ratio's denominator
    rollout_log_probs: Arrays | None = None  # [T], reported by the engine
    ref_log_probs: Arrays | None = None  # [T]
    teacher_log_probs: Arrays | None = None  # [T]
    teacher_kl: Arrays | None = None  # [T], KL(student || teacher) over a top-k set, in place of teacher_log_probs
    values: Arrays | None = None  # [T], the critic's value of the state before token t
    turn_rewards: Arrays | None = None  # [T], the reward of the turn that ends with token t; None: turns have none
    players: Sequence[tuple[str, str]] | None = None  # [N], game and role; None: one player, with the names "" and ""
    baselines: Baselines = field(default_factory=dict)  # what the estimator has returned for the batch before

    def __post_init__(self) -> None:
        n = len(self.rewards)
        for name in ("group_ids", "masks", "rollout_ids", "players", "turn_rewards", *_PER_TOKEN):
            array = getattr(self, name)
            if array is not None and len(array) != n:
                raise ValueError(f"{name} has {len(array)} entries for {n} rewards")
        if not np.isfinite(self.rewards).all():
            raise ValueError(f"rewards of samples {_first(~np.isfinite(self.rewards))} are not finite")
        for name in _PER_TOKEN:
            if getattr(self, name) is not None:
                self._check_tokens(name)
        if self.turn_rewards is not None:
            self._check_shapes("turn_rewards")
            wrong = [not np.isfinite(a).all() for a in self.turn_rewards]
            if any(wrong):
                raise ValueError(f"turn_rewards of samples {_first(np.asarray(wrong))} are not finite")

    def _check_shapes(self, name: str) -> None:
        wrong = [a.shape != m.shape for a, m in zip(getattr(self, name), self.masks)]
        if any(wrong):
            raise ValueError(f"{name} of samples {_first(np.asarray(wrong))} have other shapes than their masks")

    def _check_tokens(self, name: str) -> None:
        self._check_shapes(name)
        arrays = getattr(self, name)
        if not np.isfinite(flat(arrays)[flat(self.masks) > 0]).all():
            wrong = [not np.isfinite(a[m > 0]).all() for a, m in zip(arrays, self.masks)]
            raise ValueError(f"{name} of samples {_first(np.asarray(wrong))} are not finite on trained tokens")

    def required(self, name: str, why: str) -> Arrays:
        """Return the per-token arrays ``name``. Raises ValueError if there are none, and gives ``why``."""
        arrays: Arrays | None = getattr(self, name)
        if arrays is None:
            raise ValueError(f"{why} requires {name} of every sample")
        return arrays

    @cached_property
    def rollouts(self) -> RolloutTable:
        """The batch by rollout. Raises ValueError if siblings differ in reward or group."""
        ids = np.arange(len(self.rewards)) if self.rollout_ids is None else self.rollout_ids
        _, first_R, of_sample = np.unique(ids, return_index=True, return_inverse=True)
        for name in ("rewards", "group_ids"):
            values_N = np.asarray(getattr(self, name))
            different = values_N != values_N[first_R][of_sample]
            if different.any():
                raise ValueError(f"siblings differ in {name}: rollouts {_first(different, np.asarray(ids))}")
        return RolloutTable(
            np.asarray(self.rewards, np.float64)[first_R], np.asarray(self.group_ids)[first_R], of_sample, first_R
        )

    @property
    def fully_masked_samples(self) -> int:
        """Number of samples without a trained token. They get no gradient; their rewards still count in their group's
        baseline, as they do where DAPO masks over-long responses."""
        return sum(not mask.any() for mask in self.masks)


@dataclass(frozen=True)
class Estimate:
    """The result of an advantage estimator; arrays are shaped like the masks, and 0 where a mask is 0."""

    advantages: Arrays  # [T]
    returns: Arrays | None = None  # [T], targets of the critic
    metrics: dict[str, float] = field(default_factory=dict)
    baselines: Baselines = field(default_factory=dict)  # for the next batch; checkpoints have them


@dataclass(frozen=True)
class Correction:
    """The result of a correction. ``policy_weights`` multiply the policy term of each token, not its KL or entropy; 0
    rejects the token. Denominators do not change; see ``algorithms/corrections.py``."""

    policy_weights: Arrays  # float32 [T]
    metrics: dict[str, float] = field(default_factory=dict)


def flat(arrays: Arrays) -> np.ndarray:
    """Return all tokens of all samples in order, float64."""
    return np.concatenate([np.zeros(0), *arrays])


def masked(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return ``values`` as float64 [T], with 0 where the mask is 0, even in place of NaN."""
    return np.where(mask > 0, values, np.float64(0))


def shaped(values: Any, masks: Arrays) -> Arrays | None:
    """Return what a function of the user has returned as float64 in the shapes of ``masks``, None where it is anything
    else."""
    try:
        arrays = [np.asarray(value, np.float64) for value in values]
    except (TypeError, ValueError):
        return None
    return arrays if [array.shape for array in arrays] == [mask.shape for mask in masks] else None


def _first(wrong: np.ndarray, names: np.ndarray | None = None) -> list[int]:
    """Return at most eight of the places that are wrong, or of their names."""
    places = np.flatnonzero(wrong)
    return list(dict.fromkeys((places if names is None else names[places]).tolist()))[:8]
