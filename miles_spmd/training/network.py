"""One model on one rank: its pipeline chunks, their weights by name, and forward passes over micro-batches."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from miles_spmd.config import Config
from miles_spmd.models import Family, TensorLayout
from miles_spmd.platform.work_clock import WorkClock
from miles_spmd.protocol.results import LogProbsResult, ValuesResult
from miles_spmd.training import parallel
from miles_spmd.training.megatron_config import build_megatron_config
from miles_spmd.training.model import Scoring, build_chunks, global_names, release
from miles_spmd.training.packing import PackedBatch, pack, scatter, split, stream_length
from miles_spmd.training.passes import PASSES
from miles_spmd.types.train_sequence import MicroBatch
from miles_spmd.weights import hugging_face

Outputs = tuple[Tensor, ...]  # of the last stage, for one micro-batch: see PackedModel
LossOf = Callable[[PackedBatch, Outputs], tuple[Tensor, Any]]  # the loss, and what to return of the micro-batch


class Network:
    """A model with the weights of the Hugging Face checkpoint ``source``; torch.distributed must be initialised.

    Another network of the same run is built ``beside`` the first, in the same process groups. All ranks make the same
    calls in the same order; ranks of one model replica (tensor, pipeline and context parallel) pass the same
    micro-batches, and all ranks the same number of them.
    """

    def __init__(self, config: Config, family: Family, source: str | Path, *, beside: Network | None = None) -> None:
        self._megatron = build_megatron_config(config, family)
        self.family = family
        self.where: parallel.Coordinates = (
            beside.where if beside else parallel.initialize(self._megatron.transformer, config.run.seed)
        )
        self._device = parallel.device()
        self.work = WorkClock(self._device)  # of forward and backward passes, until gradients are summed
        self._scoring = Scoring.of(config)
        self._chunks: list[Any] = build_chunks(self._megatron.transformer, family, self.where)
        weakref.finalize(self, release, self._chunks)  # see there why the garbage collector is not enough
        self._parameters = global_names(self._chunks)
        hugging_face.load(source, self.weights(), self.layout(), family)

    @property
    def backend_values(self) -> list[Any]:
        """Megatron's dataclasses: of the network, the optimizer and the gradients."""
        return [self._megatron.transformer, self._megatron.optimizer, self._megatron.ddp]

    # ---- running the model ----

    @torch.no_grad()
    def log_probs(self, micro_batches: Sequence[MicroBatch], top_k: int = 0) -> LogProbsResult:
        """Return the log-prob of every token with a loss weight, float32 [T] per sequence; entries without a weight are
        0. Where sequences have ``candidates`` [T, K], return their log-probs, too; with ``top_k`` also ids and
        log-probs of the top tokens at each position, [T, top_k]."""
        batches = self._pack(micro_batches)
        outputs = self._score(batches, replace(self._scoring, top_k=top_k))
        names = ("log_probs", *(("candidates", "candidate_log_probs") if top_k else ()))
        if batches[0].candidates is not None:
            names += ("given_log_probs",)
        own = [(log_probs, *rest) for log_probs, _, *rest in outputs]
        return LogProbsResult(**{n: self._per_sequence(batches, v) for n, v in zip(names, zip(*own))})

    @torch.no_grad()
    def values(self, micro_batches: Sequence[MicroBatch]) -> ValuesResult:
        """Return the value before every token with a loss weight, float32 [T] per sequence; entries without a weight
        are 0."""
        batches = self._pack(micro_batches)
        outputs = self._score(batches, self._scoring)
        return ValuesResult(self._per_sequence(batches, [values for (values,) in outputs]))

    def _score(self, batches: list[PackedBatch], scoring: Scoring) -> list[Outputs]:
        return self._run(batches, scoring, lambda batch, outputs: (outputs[0].sum(), outputs), forward_only=True)

    def _pack(self, micro_batches: Sequence[MicroBatch]) -> list[PackedBatch]:
        if not micro_batches:
            raise ValueError(
                "a step needs at least one micro-batch on every rank; send a sequence without loss weights"
            )
        sequence_parallel, multiple = self._megatron.transformer.sequence_parallel, self._megatron.token_multiple
        lengths = [stream_length(m, self.where, sequence_parallel, multiple) for m in micro_batches]
        if self.where.pp_size > 1:
            # Equal shapes: sending each neighbour the next shape costs a message, and is ambiguous with virtual stages.
            lengths = [max(lengths)] * len(lengths)
        return [pack(m, self.where, self._device, length) for m, length in zip(micro_batches, lengths)]

    def _run(self, batches: list[PackedBatch], scoring: Scoring, loss_of: LossOf, forward_only: bool) -> list[Any]:
        """Return what ``loss_of`` returns of each micro-batch, on the last pipeline stage; [] on the others."""
        self.work.start()
        outcomes: list[Any] = get_forward_backward_func()(
            forward_step_func=functools.partial(_forward_step, scoring, loss_of),
            data_iterator=[iter(batches) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1] * self.where.cp_size,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        self.work.stop()
        return outcomes

    def _per_sequence(self, batches: list[PackedBatch], values: Sequence[Tensor]) -> list[np.ndarray] | None:
        """Return results of all micro-batches, one array per sequence in order, from all context-parallel ranks; None
        on ranks that return no results."""
        if not self.where.reports:
            return None
        flat = scatter(batches, values)
        if self.where.cp_group is not None:
            # every token is scored on one rank and 0 on the others, so the sum is exact
            of_ranks = torch.from_numpy(flat).to(self._device)
            dist.all_reduce(of_ranks, group=self.where.cp_group)
            flat = of_ranks.cpu().numpy()
        return split(batches, flat)

    # ---- weights ----

    def weights(self) -> dict[str, Tensor]:
        """Return this rank's parameters by their Megatron name in the whole model, for reading only. The storage is the
        model's own and does not move, so these tensors always hold the weights of the last update."""
        return {name: parameter.data for name, parameter in self._parameters.items()}

    def layout(self) -> list[TensorLayout]:
        """Return where every part of every tensor of :meth:`weights` lies in the Hugging Face checkpoint."""
        layout, where = self.family.megatron_layout, self.where.of_weights
        return [TensorLayout(name, layout(name, tuple(p.shape), **where)) for name, p in self._parameters.items()]

    def export(self, path: str | Path, source: str | Path, stop_token_ids: Sequence[int] = ()) -> None:
        """Write the weights as a Hugging Face checkpoint, with ``source``'s configuration and tokenizer."""
        hugging_face.export(path, self.weights(), self.layout(), source, self.family, stop_token_ids=stop_token_ids)

    def copy_to_host(self, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Copy the present weights to host memory, pinned where there is a GPU: new memory, or ``into`` what an earlier
        call returned."""
        copies = into or self._on_host()
        for name, weight in self.weights().items():
            copies[name].copy_(weight)
        return copies

    def read_to_host(self, path: str | Path) -> dict[str, Tensor]:
        """Read the weights of a Hugging Face checkpoint of this model as :meth:`copy_to_host` returns them. Raises
        HuggingFaceCheckpointError."""
        weights = self._on_host()
        hugging_face.load(path, weights, self.layout(), self.family)
        return weights

    def _on_host(self) -> dict[str, Tensor]:
        return {n: torch.empty_like(w, device="cpu", pin_memory=w.is_cuda) for n, w in self.weights().items()}

    def move_to_host(self) -> dict[str, Tensor]:
        """Copy the weights to host memory and release them on the device; the model runs with :meth:`replaced_by`
        then."""
        weights = self.copy_to_host()
        for name, parameter in self._parameters.items():
            parameter.data = weights[name]
        return weights

    @contextmanager
    def replaced_by(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the model with other weights: parameters refer to them within the context, their own storage is
        unchanged."""
        own = self.weights()
        try:
            for name, parameter in self._parameters.items():
                parameter.data = weights[name].to(self._device, non_blocking=True)
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = own[name]


def _forward_step(scoring: Scoring, loss_of: LossOf, batches: Iterator[PackedBatch], chunk: torch.nn.Module) -> Any:
    PASSES.enter()
    batch = next(batches)

    def finish(outputs: Outputs) -> tuple[Tensor, Tensor, Any]:
        loss, outcome = loss_of(batch, outputs)
        # Megatron divides by this number of tokens only without calculate_per_token_loss, which is set
        return loss, torch.zeros((), dtype=torch.int32, device=loss.device), outcome

    return chunk(batch=batch, scoring=scoring), finish
