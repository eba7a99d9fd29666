"""The models on the ranks, as the loop sees them: sequences out, answers back in the order of the sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec

from miles_spmd.config import Config
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.learning.micro_batches import Packing, bodies, expand, in_sequence_order, pack, pack_leaves
from miles_spmd.protocol.messages import (
    Body,
    ComputeLogProbs,
    ComputeValues,
    LogProbsResult,
    Result,
    TrainResult,
    TrainStep,
    ValuesResult,
)
from miles_spmd.types.phase import Phase
from miles_spmd.types.role import Role
from miles_spmd.types.rollout_batch import Arrays
from miles_spmd.types.train_sequence import MicroBatch, TrainSequence


class Models:
    """All of them behind ``workers``. Calls raise whatever :class:`Workers` raises."""

    def __init__(self, config: Config, workers: Cluster) -> None:
        self._config, self._workers = config, workers

    def log_probs(self, step: int, sequences: Sequence[TrainSequence], role: Role) -> Arrays:
        """Of every weighted token (others: 0), float32 [T] per sequence."""
        return self._log_probs(step, sequences, role)["log_probs"]

    def top_k_tokens(
        self, step: int, sequences: Sequence[TrainSequence], role: Role, count: int
    ) -> tuple[Arrays, Arrays]:
        """The ``count`` most likely tokens in the place of every weighted one: ids and log-probs, [T, count]."""
        found = self._log_probs(step, sequences, role, count)
        return found["candidates"], found["candidate_log_probs"]

    def log_probs_of(self, step: int, sequences: Sequence[TrainSequence], role: Role, tokens: Arrays) -> Arrays:
        """Of other tokens [T, K] in the place of every weighted one, float32 [T, K]."""
        asking = [msgspec.structs.replace(s, candidates=t) for s, t in zip(sequences, tokens, strict=True)]
        return self._log_probs(step, asking, role)["given_log_probs"]

    def _log_probs(
        self, step: int, sequences: Sequence[TrainSequence], role: Role, top_k: int = 0
    ) -> dict[str, Arrays]:
        """What ranks reply with, by the names of LogProbsResult, in the order of the sequences."""
        packing, results = self._call(
            step, Phase.LOG_PROBS, sequences, lambda micro_batches: ComputeLogProbs(micro_batches, role, top_k)
        )
        answers = {name: [getattr(r, name) for r in results] for name in LogProbsResult.__struct_fields__}
        trainers, count = self._workers.trainers, len(sequences)
        return {name: in_sequence_order(packing, trainers, a, count) for name, a in answers.items() if any(a)}

    def values(self, step: int, sequences: Sequence[TrainSequence], role: Role) -> Arrays:
        """A value head's output before every weighted token, float32 [T] per sequence."""
        packing, results = self._call(
            step, Phase.LOG_PROBS, sequences, lambda micro_batches: ComputeValues(micro_batches, role)
        )
        answers = [cast(ValuesResult, result).values for result in results]
        return in_sequence_order(packing, self._workers.trainers, answers, len(sequences))

    def train(self, step: int, sequences: Sequence[TrainSequence], role: Role) -> tuple[list[TrainResult], Arrays]:
        """One optimizer step. Every trainer rank's result, and what was computed of each sequence before the update."""
        packing, results = self._call(
            step, Phase.TRAIN, sequences, lambda micro_batches: TrainStep(micro_batches, role)
        )
        answers = [cast(TrainResult, result).log_probs for result in results]
        return cast(list[TrainResult], results), in_sequence_order(
            packing, self._workers.trainers, answers, len(sequences)
        )

    def _call(
        self, step: int, phase: Phase, sequences: Sequence[TrainSequence], make: Callable[[list[MicroBatch]], Body]
    ) -> tuple[Packing, list[Result]]:
        packing = self._pack(sequences)
        body = bodies(packing, sequences, self._workers.trainers, make)
        return packing, self._workers.call(body, step=step, phase=phase)

    def _pack(self, sequences: Sequence[TrainSequence]) -> Packing:
        m = self._config.megatron
        unit = 2 if self._config.trains_on_pairs else 1  # what must be in one micro-batch
        lengths = [len(s.tokens) for s in sequences]
        interleaved = "virtual_pipeline_model_parallel_size" in m or "num_layers_per_virtual_pipeline_stage" in m
        where: dict[str, Any] = {
            "data_parallel_size": self._workers.trainers[0].data_parallel_size,
            "multiple": int(m["pipeline_model_parallel_size"]) if interleaved else 1,
        }
        units = [sum(lengths[i : i + unit]) for i in range(0, len(lengths), unit)]
        if leaves := self._config.train.reduction_leaves:
            max_tokens = self._config.train.leaf_tokens
            return expand(pack_leaves(units, leaves=leaves, max_tokens=max_tokens, **where), unit)
        return expand(pack(units, max_tokens=self._config.micro_batch_tokens, **where), unit)
