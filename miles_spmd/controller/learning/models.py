"""The models on the ranks as functions of sequences: micro-batches out, results back in the order of the sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from miles_spmd.config import Config
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.learning.micro_batches import Packing, commands, expand, in_sequence_order, pack, pack_leaves
from miles_spmd.protocol.commands import Command, ComputeLogProbs, ComputeValues, TrainStep
from miles_spmd.protocol.results import Result, TrainResult
from miles_spmd.types.role import Role
from miles_spmd.types.rollout_batch import Arrays
from miles_spmd.types.train_sequence import MicroBatch, TrainSequence

R = TypeVar("R", bound=Result)


class Models:
    """The models of all roles. Every method raises WorkerError where a rank fails."""

    def __init__(self, config: Config, cluster: Cluster) -> None:
        self._config, self._cluster = config, cluster

    def log_probs(self, step: int, sequences: Sequence[TrainSequence], role: Role) -> Arrays:
        """Return the log-prob of every token with a loss weight, float32 [T] per sequence; the other entries are 0."""
        (log_probs,) = self._log_probs(step, sequences, role, ["log_probs"])
        return log_probs

    def top_k_tokens(
        self, step: int, sequences: Sequence[TrainSequence], role: Role, count: int
    ) -> tuple[Arrays, Arrays]:
        """Return the ``count`` most likely tokens at the position of every token with a loss weight, int32 [T, count],
        and their log-probs, float32 [T, count]."""
        ids, log_probs = self._log_probs(step, sequences, role, ["candidates", "candidate_log_probs"], count)
        return ids, log_probs

    def log_probs_of(self, step: int, sequences: Sequence[TrainSequence], role: Role, tokens: Arrays) -> Arrays:
        """Return the log-probs of the given ``tokens`` [T, K] at the position of every token with a loss weight,
        float32 [T, K]."""
        asking = [msgspec.structs.replace(s, candidates=t) for s, t in zip(sequences, tokens, strict=True)]
        (log_probs,) = self._log_probs(step, asking, role, ["given_log_probs"])
        return log_probs

    def values(self, step: int, sequences: Sequence[TrainSequence], role: Role) -> Arrays:
        """Return a value head's output before every token with a loss weight, float32 [T]; the other entries are 0."""
        _, (values,) = self._call(step, sequences, lambda m: ComputeValues(m, role), ["values"])
        return values

    def train(self, step: int, sequences: Sequence[TrainSequence], role: Role) -> tuple[list[TrainResult], Arrays]:
        """Make one optimizer step. Returns the result of every trainer rank, and the log-probs (of a critic or reward
        model: the values) of the sequences before the update."""
        results, (log_probs,) = self._call(step, sequences, lambda m: TrainStep(m, role), ["log_probs"])
        return results, log_probs

    def _log_probs(
        self, step: int, sequences: Sequence[TrainSequence], role: Role, fields: Sequence[str], top_k: int = 0
    ) -> list[Arrays]:
        _, arrays = self._call(step, sequences, lambda m: ComputeLogProbs(m, role, top_k), fields)
        return arrays

    def _call(
        self,
        step: int,
        sequences: Sequence[TrainSequence],
        make: Callable[[list[MicroBatch]], Command[R]],
        fields: Sequence[str],
    ) -> tuple[list[R], list[Arrays]]:
        """Give every rank its micro-batches. Returns the ranks' results, and each of their ``fields`` for all sequences
        in order."""
        trainers = self._cluster.trainers
        packing = self._pack([len(s.tokens) for s in sequences], trainers[0].data_parallel_size)
        results = self._cluster.call(commands(packing, sequences, trainers, make), step=step)
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
            max_tokens = self._config.train.leaf_tokens
            return expand(pack_leaves(units, leaves=leaves, max_tokens=max_tokens, **shape), unit)
        return expand(pack(units, max_tokens=self._config.micro_batch_tokens, **shape), unit)
