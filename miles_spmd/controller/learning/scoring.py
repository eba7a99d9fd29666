"""What the models compute of a rollout before it is trained on: old and reference log-probs, values, distillation."""

from __future__ import annotations

from collections.abc import Sequence

from miles_spmd.algorithms.distillation import Candidates, topk_reverse_kl
from miles_spmd.config import AlgorithmConfig, Config
from miles_spmd.controller.learning.models import Models
from miles_spmd.types.role import Role
from miles_spmd.types.rollout_batch import Arrays
from miles_spmd.types.train_sequence import TrainSequence

Scores = dict[str, Arrays]  # by the names of RolloutBatch's fields


def score(step: int, sequences: Sequence[TrainSequence], models: Models, config: Config) -> Scores:
    """Return the scores that the algorithm needs from before the update, and no others.

    The old policy is the engine's with ``use_rollout_logprobs``, else the trainer's: with ``keep_old_actor`` that of
    the weights that generated, else of the newest. Where only one optimizer step follows and nothing else needs them,
    old log-probs are left out: the training forward pass computes the same.
    """
    a = config.algorithm
    scores: Scores = {}
    several_steps = (config.train.global_batch_size or len(sequences)) < len(sequences)
    if a.use_rollout_logprobs:
        scores["old_log_probs"] = [s.rollout_log_probs for s in sequences if s.rollout_log_probs is not None]
    elif (
        several_steps or a.keep_old_actor or a.kl_coef or a.use_tis or a.opd_kl_coef or config.determinism.masks_tokens
    ):
        old = Role.OLD_ACTOR if a.keep_old_actor else Role.ACTOR
        scores["old_log_probs"] = models.log_probs(step, sequences, old)
    if config.has_reference:
        scores["ref_log_probs"] = models.log_probs(step, sequences, Role.REF)
    if config.has_critic:
        scores["values"] = models.values(step, sequences, Role.CRITIC)
    if config.has_teacher and not a.opd_log_prob_top_k:
        scores["teacher_log_probs"] = models.log_probs(step, sequences, Role.TEACHER)
    elif config.has_teacher:
        scores["teacher_kl"] = _teacher_kl(step, sequences, models, a)
    return scores


def _teacher_kl(step: int, sequences: Sequence[TrainSequence], models: Models, algorithm: AlgorithmConfig) -> Arrays:
    """Return the estimated KL(student || teacher), [T] per sequence, over the top-k tokens of one of them or both.

    Each model's top-k tokens are scored by the other one, too.
    """
    k, strategy = algorithm.opd_log_prob_top_k, algorithm.opd_top_k_strategy
    students: list[Candidates | None] = [None] * len(sequences)
    teachers = students
    if strategy != "only-teacher":
        ids, own = models.top_k_tokens(step, sequences, Role.ACTOR, k)
        others = models.log_probs_of(step, sequences, Role.TEACHER, ids)
        students = [Candidates(*arrays) for arrays in zip(ids, own, others, strict=True)]
    if strategy != "only-student":
        ids, own = models.top_k_tokens(step, sequences, Role.TEACHER, k)
        others = models.log_probs_of(step, sequences, Role.ACTOR, ids)
        teachers = [Candidates(*arrays) for arrays in zip(ids, others, own, strict=True)]
    return [
        topk_reverse_kl(s, t, strategy=strategy, weight_mode=algorithm.opd_reward_weight_mode)
        for s, t in zip(students, teachers, strict=True)
    ]
