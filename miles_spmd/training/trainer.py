"""One rank of the trainer: log-probs, optimizer steps, weights and checkpoints of a Megatron model."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from miles_spmd.algorithms.losses import LossFunction
from miles_spmd.checkpoint import dist as checkpoint
from miles_spmd.checkpoint import hf
from miles_spmd.config.schema import Config
from miles_spmd.data.sample import MicroBatch
from miles_spmd.messaging.wire import LogProbsResult, TrainResult
from miles_spmd.models import Family, TensorLayout
from miles_spmd.training import parallel
from miles_spmd.training.model import build_chunks, global_names, release
from miles_spmd.training.optimizer import build_optimizer, build_schedule, update
from miles_spmd.training.packing import PackedBatch, pack, scatter, split, stream_length
from miles_spmd.training.settings import build_settings


class Outcome(NamedTuple):
    """What the last pipeline stage keeps of one micro-batch."""

    log_probs: Tensor  # fp32 [S]
    sums: dict[str, Tensor]


class Trainer:
    """Starts from ``config.model.hf_checkpoint``; torch.distributed must be initialised.

    The gradient of a step is the plain sum over all sequences of all micro-batches on all ranks of
    ``loss_weights * per-token loss``. All ranks make the same calls in the same order; ranks of one model replica
    (tensor, pipeline and context parallel) get the same micro-batches, and all ranks the same number of them.
    """

    def __init__(self, config: Config, family: Family, loss_function: LossFunction) -> None:
        settings = build_settings(config, family)
        self._settings = settings
        self._family = family
        self._loss_function = loss_function
        self._temperature = _temperature(config)
        self._where = parallel.initialize(settings.transformer, config.run.seed)
        self._device = parallel.device()
        self._chunks = build_chunks(settings, family, self._where)
        weakref.finalize(self, release, self._chunks)
        self._parameters = global_names(self._chunks, self._where)
        self._reference: dict[str, Tensor] | None = None
        if _needs_reference(config):
            hf.load(config.model.ref_load or config.model.hf_checkpoint, self.weights(), self.layout(), family)
            self._reference = {name: _on_host(weight) for name, weight in self.weights().items()}
        hf.load(config.model.hf_checkpoint, self.weights(), self.layout(), family)
        self._optimizer = build_optimizer(settings, self._chunks)
        self._schedule = build_schedule(config, settings, self._optimizer)
        self._connect_schedule()

    @property
    def data_parallel_rank(self) -> int:
        return self._where.dp_rank

    @property
    def data_parallel_size(self) -> int:
        return self._where.dp_size

    @property
    def reports(self) -> bool:
        """Whether this rank's sums count: last pipeline stage, first tensor-parallel, any context-parallel rank."""
        return self._where.reports

    # ---- running the model ----

    def log_probs(self, micro_batches: Sequence[MicroBatch], model: str = "actor") -> LogProbsResult:
        """Log-probs of the tokens that have a loss weight (others: 0) under the actor or the reference policy "ref"."""
        batches = self._pack(micro_batches)
        with self._weights_of(model), torch.no_grad():
            outcomes = self._run(batches, forward_only=True)
        return LogProbsResult(self._per_sequence(batches, [o.log_probs for o in outcomes]))

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> TrainResult:
        """One optimizer step. A non-finite loss or gradient anywhere makes every rank skip it, see ``skipped``.

        The learning-rate schedule advances with updates made, not with steps asked for.
        """
        batches = self._pack(micro_batches)
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        outcomes = self._run(batches, forward_only=False)
        lr = self._optimizer.param_groups[0]["lr"]
        norm, updated = update(self._optimizer)
        if updated:
            self._schedule.step(1)
            self._finish_gathering_parameters()
        sums = _add_up([o.sums for o in outcomes])
        return TrainResult(
            sums=sums,
            grad_norm=norm,
            lr=lr,
            skipped="" if updated else _why_skipped(sums),
            log_probs=self._per_sequence(batches, [o.log_probs for o in outcomes]),
        )

    def _pack(self, micro_batches: Sequence[MicroBatch]) -> list[PackedBatch]:
        if not micro_batches:
            raise ValueError(
                "a step needs at least one micro-batch on every rank; send a sequence without loss weights"
            )
        sequence_parallel = self._settings.transformer.sequence_parallel
        lengths = [stream_length(micro_batch, self._where, sequence_parallel) for micro_batch in micro_batches]
        if self._where.pp_size > 1:
            # equal shapes: telling each neighbour the next one costs a message, and is ambiguous between virtual stages
            lengths = [max(lengths)] * len(lengths)
        return [pack(m, self._where, self._device, length) for m, length in zip(micro_batches, lengths)]

    def _run(self, batches: list[PackedBatch], forward_only: bool) -> list[Outcome]:
        iterators = [iter(batches) for _ in self._chunks]
        many = len(self._chunks) > 1
        return get_forward_backward_func()(
            forward_step_func=functools.partial(self._forward_step, training=not forward_only),
            data_iterator=iterators if many else iterators[0],
            model=self._chunks if many else self._chunks[0],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1] * self._where.cp_size,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _forward_step(self, batches: Iterator[PackedBatch], chunk: DistributedDataParallel, training: bool) -> Any:
        batch = next(batches)
        output = chunk(
            batch=batch,
            temperature=self._temperature,
            differentiate_entropy=training and self._loss_function.differentiates_entropy,
        )
        return output, functools.partial(self._loss, batch) if training else _forward_only

    def _loss(self, batch: PackedBatch, scores: Tensor) -> tuple[Tensor, Tensor, Outcome]:
        log_probs, entropy = scores
        per_token, sums = self._loss_function(log_probs, entropy, batch.batch)
        loss = (batch.batch.loss_weights * per_token).sum()
        if not torch.isfinite(loss):
            # its gradient may still be finite: make it not, so that all ranks see it in the norm and skip alike
            loss = loss * float("nan")
        return loss, _no_count(), Outcome(log_probs.detach(), {"loss": loss.detach(), **sums})

    def _per_sequence(self, batches: list[PackedBatch], values: list[Tensor]) -> list[np.ndarray] | None:
        if not self._where.reports:
            return None
        flat = scatter(batches, values)
        if self._where.cp_group is not None:
            everywhere = torch.from_numpy(flat).to(self._device)
            dist.all_reduce(everywhere, group=self._where.cp_group)
            flat = everywhere.cpu().numpy()
        return split(batches, flat)

    def _finish_gathering_parameters(self) -> None:
        """With overlap_param_gather new weights would arrive in the next forward pass; the engine reads them before."""
        if self._settings.ddp.overlap_param_gather:
            for chunk in self._chunks:
                chunk.start_param_sync(force_sync=True)

    def _connect_schedule(self) -> None:
        """What Megatron's pipeline schedules call back, as its own training loop sets it up."""
        config, ddp = self._settings.transformer, self._settings.ddp
        config.finalize_model_grads_func = _sum_gradients

        def per_chunk(functions: list[Any]) -> Any:
            return functions if len(functions) > 1 else functions[0]

        if ddp.overlap_grad_reduce:
            config.no_sync_func = per_chunk([chunk.no_sync for chunk in self._chunks])
        if ddp.overlap_param_gather and ddp.align_param_gather:
            config.param_sync_func = per_chunk([chunk.start_param_sync for chunk in self._chunks])

    # ---- weights and checkpoints ----

    def weights(self) -> dict[str, Tensor]:
        """This rank's parameters by their Megatron name in the whole model. The storage is the model's own and stays
        where it is, so these tensors always hold the weights of the last update. Not to be written into."""
        return {name: parameter.data for name, parameter in self._parameters.items()}

    def layout(self) -> list[TensorLayout]:
        """Where every part of every tensor of :meth:`weights` lies in the Hugging Face checkpoint."""
        where = self._where
        return [
            TensorLayout(
                name,
                self._family.megatron_layout(
                    name,
                    tuple(parameter.shape),
                    tp_rank=where.tp_rank,
                    tp_size=where.tp_size,
                    etp_rank=where.etp_rank,
                    etp_size=where.etp_size,
                ),
            )
            for name, parameter in self._parameters.items()
        ]

    def load_hf(self, path: str | Path) -> None:
        """Replace the weights by a Hugging Face checkpoint's; moments and schedule stay. Raises CheckpointError."""
        hf.load(path, self.weights(), self.layout(), self._family)
        self._optimizer.reload_model_params()

    def save(self, path: str | Path) -> None:
        """Write weights, optimizer, schedule and random state into the folder ``path``; every rank calls it."""
        checkpoint.save(path, self._chunks, self._optimizer, self._schedule)

    def load(self, path: str | Path) -> None:
        """Continue from what :meth:`save` wrote, under the same or another layout; see ``checkpoint.dist``."""
        checkpoint.load(path, self._chunks, self._optimizer, self._schedule)

    @contextmanager
    def _weights_of(self, model: str) -> Iterator[None]:
        """Run the model with other weights: parameters point to them for a while, their own storage is untouched."""
        if model == "actor":
            yield
            return
        if model != "ref":
            raise ValueError(f"there is no model {model!r}; there are actor and ref")
        if self._reference is None:
            raise ValueError("no reference weights are kept: neither kl_coef nor kl_loss_coef is set")
        own = self.weights()
        try:
            for name, parameter in self._parameters.items():
                parameter.data = self._reference[name].to(self._device, non_blocking=True)
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = own[name]


def _on_host(weight: Tensor) -> Tensor:
    """A copy that returns to its device at full speed."""
    return torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda).copy_(weight)


def _temperature(config: Config) -> float:
    """Of the distribution that is trained: the one that was sampled from. Greedy sampling trains the plain one."""
    return (config.rollout.rollout_temperature or 1.0) if config.run.mode == "rl" else 1.0


def _needs_reference(config: Config) -> bool:
    algorithm = config.algorithm
    return config.run.mode == "rl" and bool(algorithm.kl_coef or algorithm.kl_loss_coef)


def _sum_gradients(model: list[Any], num_tokens: Tensor | None = None, **groups: Any) -> None:
    """All reductions of the gradient, but not Megatron's division by the number of tokens."""
    finalize_model_grads(model, None, **groups)


def _forward_only(scores: Tensor) -> tuple[Tensor, Tensor, Outcome]:
    log_probs = scores[0]
    return log_probs.sum(), _no_count(), Outcome(log_probs, {})


def _no_count() -> Tensor:
    """What Megatron would divide by."""
    return torch.zeros((), dtype=torch.int32, device=parallel.device())


def _add_up(sums: list[dict[str, Tensor]]) -> dict[str, float]:
    """Over micro-batches, in their order, with one transfer to the host."""
    if not sums:
        return {}
    names = list(sums[0])
    totals = torch.stack([torch.stack([s[name].double() for name in names]) for s in sums]).sum(0)
    return dict(zip(names, totals.tolist()))


def _why_skipped(sums: dict[str, float]) -> str:
    """Ranks whose own loss was fine, or that have none, saw the gradient only."""
    return "non-finite gradient" if math.isfinite(sums.get("loss", 0.0)) else "non-finite loss"
