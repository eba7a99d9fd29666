"""On-policy distillation (OPD): the student learns from a teacher's probabilities of the tokens that it sampled.

Source: Thinking Machines, "On-Policy Distillation" (2025); the top-k forms and their names are those of Miles.
Shape suffixes: T tokens of one sample, K candidates at each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from miles_spmd.types.rollout_batch import Arrays, RolloutBatch, masked

STRATEGIES = ("only-student", "only-teacher", "intersection", "union", "xor")
WEIGHT_MODES = ("student_p", "teacher_p", "none")


def reverse_kl(batch: RolloutBatch) -> Arrays:
    """Return an estimate of KL(student || teacher) at every trained token, float64 [T]: log student - log teacher of
    the sampled token, or the batch's ``teacher_kl`` if it has it."""
    if batch.teacher_kl is not None:
        return [masked(kl, mask) for kl, mask in zip(batch.teacher_kl, batch.masks)]
    student = batch.required("old_log_probs", "opd_kl_coef")
    teacher = batch.required("teacher_log_probs", "opd_kl_coef")
    return [masked(s, m) - masked(t, m) for s, t, m in zip(student, teacher, batch.masks)]


@dataclass(frozen=True)
class Candidates:
    """One policy's most likely tokens at each position of a sample, with the log-probs of both policies."""

    ids: np.ndarray  # int [T, K], distinct in a row
    student_log_probs: np.ndarray  # [T, K]
    teacher_log_probs: np.ndarray  # [T, K]


def topk_reverse_kl(
    student: Candidates | None, teacher: Candidates | None, *, strategy: str, weight_mode: str
) -> np.ndarray:
    """Return the sum of w (log student - log teacher) over a set S of tokens, float64 [T]: ``RolloutBatch.teacher_kl``.

    S is the student's or the teacher's candidates, or their intersection, union or symmetric difference. w is the
    student's or teacher's probability, or uniform, normalised over S; but not for ``xor``, whose S contains only the
    few tokens that one of the two leaves out, which normalising would give all the weight. An empty S gives 0.
    Raises ValueError for unknown names, and if the candidates that the strategy requires are missing.
    """
    if strategy not in STRATEGIES or weight_mode not in WEIGHT_MODES:
        raise ValueError(
            f"unknown opd_top_k_strategy {strategy!r} (known: {', '.join(STRATEGIES)}) "
            f"or opd_reward_weight_mode {weight_mode!r} (known: {', '.join(WEIGHT_MODES)})"
        )
    parts = _selected(student, teacher, strategy)
    chosen = np.concatenate([inside for _, inside in parts], 1)
    log_s = np.concatenate([c.student_log_probs for c, _ in parts], 1).astype(np.float64)
    log_t = np.concatenate([c.teacher_log_probs for c, _ in parts], 1).astype(np.float64)
    log_w = np.where(
        chosen, {"student_p": log_s, "teacher_p": log_t, "none": np.zeros_like(log_s)}[weight_mode], -np.inf
    )
    if strategy == "xor":
        weights = np.exp(log_w)
    else:
        peak = log_w.max(1, keepdims=True, initial=-np.inf)
        weights = np.exp(log_w - np.where(np.isfinite(peak), peak, 0.0))
        weights /= np.maximum(weights.sum(1, keepdims=True), 1.0)  # the peak's own weight is 1, unless S is empty
    return (weights * np.where(chosen, log_s - log_t, 0.0)).sum(1)


def _selected(
    student: Candidates | None, teacher: Candidates | None, strategy: str
) -> list[tuple[Candidates, np.ndarray]]:
    """Return the candidates, and which of them are in S, bool [T, K]."""
    if student is None and strategy != "only-teacher":
        raise ValueError(f"opd_top_k_strategy {strategy!r} requires the student's candidates")
    if teacher is None and strategy != "only-student":
        raise ValueError(f"opd_top_k_strategy {strategy!r} requires the teacher's candidates")
    if student is None or teacher is None:
        alone = student or teacher
        assert alone is not None
        return [(alone, np.ones(alone.ids.shape, bool))]
    shared_TKK = student.ids[:, :, None] == teacher.ids[:, None, :]
    s_shared, t_shared = shared_TKK.any(2), shared_TKK.any(1)
    s_all, t_all = np.ones_like(s_shared), np.ones_like(t_shared)
    return {
        "only-student": [(student, s_all)],
        "only-teacher": [(teacher, t_all)],
        "intersection": [(student, s_shared)],
        "union": [(student, s_all), (teacher, ~t_shared)],
        "xor": [(student, ~s_shared), (teacher, ~t_shared)],
    }[strategy]
