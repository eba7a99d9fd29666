"""The models on the ranks as functions of sequences: micro-batches out, results back in the order of the sequences; and
what an algorithm or an evaluation computes with several of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import msgspec
import numpy as np

from miles_spmd.algorithms.distillation import Candidates, topk_reverse_kl
from miles_spmd.config import Config
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.learning.batch import Scores, pair_sequences
from miles_spmd.controller.learning.micro_batches import (
    Packing,
    commands,
    expand,
    in_sequence_order,
    pack_by,
    pack_leaves,
)
from miles_spmd.data.examples import PreferencePair
from miles_spmd.protocol.commands import Command, ComputeLogProbs, ComputeValues, TrainStep
from miles_spmd.protocol.results import Result, TrainResult
from miles_spmd.types.engine_group import POLICY
from miles_spmd.types.role import Role
from miles_spmd.types.rollout_batch import Arrays
from miles_spmd.types.train_sequence import MicroBatch, TrainSequence

R = TypeVar("R", bound=Result)
C = TypeVar("C", bound=Command)


class Models:
    """The models of all roles on the ranks of ``group``. Every method raises WorkerError where a rank fails."""

    def __init__(self, config: Config, cluster: Cluster, group: str = POLICY) -> None:
        self._config, self._cluster, self._group = config, cluster, group

    def log_probs(self, step: int, sequences: Sequence[TrainSequence], role: Role) -> Arrays:
        """Return the log-prob of every token with a loss weight, float32 [T] per sequence; the other entries are 0."""
        _, (log_probs,) = self._call(step, sequences, lambda m: ComputeLogProbs(m, role), "log_probs")
        return log_probs

    def top_k_tokens(
        self, step: int, sequences: Sequence[TrainSequence], role: Role, count: int
    ) -> tuple[Arrays, Arrays]:
        """Return the ``count`` most likely tokens at the position of every token with a loss weight, int32 [T, count],
        and their log-probs, float32 [T, count]."""
        fields = "candidates", "candidate_log_probs"
        _, (ids, log_probs) = self._call(step, sequences, lambda m: ComputeLogProbs(m, role, count), *fields)
        return ids, log_probs

    def log_probs_of(self, step: int, sequences: Sequence[TrainSequence], role: Role, tokens: Arrays) -> Arrays:
        """Return the log-probs of the given ``tokens`` [T, K] at the position of every token with a loss weight,
        float32 [T, K]."""
        asking = [msgspec.structs.replace(s, candidates=t) for s, t in zip(sequences, tokens, strict=True)]
        _, (log_probs,) = self._call(step, asking, lambda m: ComputeLogProbs(m, role), "given_log_probs")
        return log_probs

    def values(self, step: int, sequences: Sequence[TrainSequence], role: Role) -> Arrays:
        """Return a value head's output before every token with a loss weight, float32 [T]; the other entries are 0."""
        _, (values,) = self._call(step, sequences, lambda m: ComputeValues(m, role), "values")
        return values

    def train(self, step: int, sequences: Sequence[TrainSequence], role: Role) -> tuple[list[TrainResult], Arrays]:
        """Make one optimizer step. Returns the result of every trainer rank, and the log-probs (of a critic or reward
        model: the values) of the sequences before the update."""
        train = partial(self._cluster.train, step=step, group=self._group)
        results, (log_probs,) = self._call(step, sequences, lambda m: TrainStep(m, role), "log_probs", execute=train)
        return results, log_probs

    # --- what is computed with several of them -----------------------------------------------------------------------

    def scores(self, step: int, sequences: Sequence[TrainSequence]) -> Scores:
        """Return the scores of a rollout that the algorithm needs from before the update, and no others.

        The old policy is the engine's with ``use_rollout_logprobs``, else the trainer's: with ``keep_old_actor`` that
        of the weights that generated, else of the newest. Where only one optimizer step follows and nothing else needs
        them, old log-probs are left out: the training forward pass computes the same.
        """
        config, a = self._config, self._config.algorithm
        scores: Scores = {}
        several_steps = (config.train.global_batch_size or len(sequences)) < len(sequences)
        if a.use_rollout_logprobs:
            scores["old_log_probs"] = [s.rollout_log_probs for s in sequences if s.rollout_log_probs is not None]
        elif several_steps or any(
            [a.keep_old_actor, a.kl_coef, a.use_tis, a.opd_kl_coef, config.determinism.masks_tokens]
        ):
            old = Role.OLD_ACTOR if a.keep_old_actor else Role.ACTOR
            scores["old_log_probs"] = self.log_probs(step, sequences, old)
        if config.has_reference:
            scores["ref_log_probs"] = self.log_probs(step, sequences, Role.REF)
        if config.has_critic:
            scores["values"] = self.values(step, sequences, Role.CRITIC)
        if config.has_teacher and a.opd_log_prob_top_k:
            scores["teacher_kl"] = self._teacher_kl(step, sequences)
        elif config.has_teacher:
            scores["teacher_log_probs"] = self.log_probs(step, sequences, Role.TEACHER)
        return scores

    def _teacher_kl(self, step: int, sequences: Sequence[TrainSequence]) -> Arrays:
        """Return the estimated KL(student || teacher), [T] per sequence, over the top-k tokens of one of them or both.

        Each model's top-k tokens are scored by the other one, too.
        """
        a = self._config.algorithm
        students: list[Candidates | None] = [None] * len(sequences)
        teachers = students
        if a.opd_top_k_strategy != "only-teacher":
            ids, own = self.top_k_tokens(step, sequences, Role.ACTOR, a.opd_log_prob_top_k)
            others = self.log_probs_of(step, sequences, Role.TEACHER, ids)
            students = [Candidates(*arrays) for arrays in zip(ids, own, others, strict=True)]
        if a.opd_top_k_strategy != "only-student":
            ids, own = self.top_k_tokens(step, sequences, Role.TEACHER, a.opd_log_prob_top_k)
            others = self.log_probs_of(step, sequences, Role.ACTOR, ids)
            teachers = [Candidates(*arrays) for arrays in zip(ids, others, own, strict=True)]
        return [
            topk_reverse_kl(s, t, strategy=a.opd_top_k_strategy, weight_mode=a.opd_reward_weight_mode)
            for s, t in zip(students, teachers, strict=True)
        ]

    def preference_metrics(self, step: int, name: str, pairs: Sequence[PreferencePair]) -> dict[str, float]:
        """Return the metrics of one evaluation set of pairs: ``eval/<name>`` is the share of pairs whose preferred
        response has the higher score (equal scores count half), ``eval/<name>-margin`` the mean difference.

        The score is the reward model's, or what ``preference_loss`` compares, without its beta.
        """
        sequences = pair_sequences(pairs)
        masks = [sequence.loss_weights for sequence in sequences]
        compute = self.values if self._config.run.mode == "rm" else self.log_probs
        scores = compute(step, sequences, Role.ACTOR)
        if self._config.has_reference:
            reference = self.log_probs(step, sequences, Role.REF)
            scores = [own - ref for own, ref in zip(scores, reference, strict=True)]
        simpo = self._config.run.mode == "dpo" and self._config.algorithm.preference_loss == "simpo"
        # SimPO compares means over tokens, the other losses sums
        totals = np.asarray([(s * m).sum() / (m.sum() if simpo else 1) for s, m in zip(scores, masks, strict=True)])
        margins = totals[::2] - totals[1::2]
        right = (margins > 0) + 0.5 * (margins == 0)
        return {f"eval/{name}": float(right.mean()), f"eval/{name}-margin": float(margins.mean())}

    # --- commands ----------------------------------------------------------------------------------------------------

    def _call(
        self,
        step: int,
        sequences: Sequence[TrainSequence],
        make: Callable[[list[MicroBatch]], C],
        *fields: str,
        execute: Callable[[list[C]], list[R]] | None = None,
    ) -> tuple[list[R], list[Arrays]]:
        """Give every rank its micro-batches, and ``execute`` what is made of these on all of them. Returns their
        results, and each of the ``fields`` for all sequences in order."""
        trainers = self._cluster.trainers(self._group)
        packing = self._pack([len(s.tokens) for s in sequences], trainers[0].data_parallel_size)
        execute = execute or partial(self._cluster.share, step=step, group=self._group)
        results = execute(commands(packing, sequences, trainers, make))
        arrays = [[getattr(result, field) for result in results] for field in fields]
        return results, [in_sequence_order(packing, trainers, of_field, len(sequences)) for of_field in arrays]

    def _pack(self, lengths: Sequence[int], data_parallel_size: int) -> Packing:
        m = self._config.megatron
        # an interleaved pipeline schedule needs a multiple of the number of stages
        interleaved = "virtual_pipeline_model_parallel_size" in m or "num_layers_per_virtual_pipeline_stage" in m
        shape: dict[str, int] = {
            "data_parallel_size": data_parallel_size,
            "multiple": int(m["pipeline_model_parallel_size"]) if interleaved else 1,
        }
        unit = 2 if self._config.trains_on_pairs else 1  # sequences that must be in one micro-batch
        units = [sum(lengths[i : i + unit]) for i in range(0, len(lengths), unit)]
        if leaves := self._config.train.reduction_leaves:
            max_tokens = min(self._config.train.leaf_tokens, self._config.micro_batch_tokens)
            return expand(pack_leaves(units, leaves=leaves, max_tokens=max_tokens, **shape), unit)
        max_tokens = self._config.micro_batch_tokens
        return expand(pack_by(self._config.train.packing, units, max_tokens=max_tokens, **shape), unit)
