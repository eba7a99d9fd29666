"""A network that is trained: its loss, its optimizer, and its part of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from miles_spmd.algorithms.losses import Loss
from miles_spmd.config import Config
from miles_spmd.models import Family
from miles_spmd.platform.work_clock import WorkClock
from miles_spmd.protocol.results import TrainResult, UpdateDigests
from miles_spmd.training.checkpoint import TrainerCheckpoint
from miles_spmd.training.digests import TrainerDigests, to_host
from miles_spmd.training.network import Network, Outputs
from miles_spmd.training.offload import Offload
from miles_spmd.training.optimizer import build_optimizer, build_schedule, update
from miles_spmd.training.packing import PackedBatch
from miles_spmd.training.reduction import TreeSum, plain_sum
from miles_spmd.types.train_sequence import MicroBatch

# What the last pipeline stage returns of one micro-batch: log-probs or values, fp32 [S], and the loss's sums.
Outcome = tuple[Tensor, dict[str, Tensor]]
Sums = list[dict[str, float]]  # of each leaf
Scores = list[np.ndarray] | None  # log-probs or values, float32 [T] per sequence; None on ranks that do not report


class Update(NamedTuple):
    """What came of one update, which may have been skipped."""

    grad_norm: float
    lr: float
    made: bool
    digests: UpdateDigests | None

    def result(self, sums: Sums, scores: Scores) -> TrainResult:
        # a rank without a loss, or with a finite one, can only name the gradient
        finite = all(math.isfinite(leaf.get("loss", 0.0)) for leaf in sums)
        skipped = "" if self.made else f"non-finite {'gradient' if finite else 'loss'}"
        return TrainResult(sums, self.grad_norm, self.lr, skipped, scores, self.digests)


class Trainer(Network):
    """A network with an optimizer. The loss of a step is the plain sum of ``loss_weights * per-token loss`` over all
    sequences of all micro-batches on all ranks.

    ``loss_function`` takes log-probs (a policy's), or values where ``family`` has a value head. ``source`` and
    ``beside`` as for :class:`Network`; ``source`` is the configuration's checkpoint by default.
    """

    def __init__(
        self,
        config: Config,
        family: Family,
        loss_function: Loss,
        *,
        source: str | Path | None = None,
        beside: Network | None = None,
    ) -> None:
        super().__init__(config, family, source or config.model.hf_checkpoint, beside=beside)
        self._loss_function = loss_function
        transformer, ddp = self._megatron.transformer, self._megatron.ddp
        self._chunks[:] = [
            DistributedDataParallel(transformer, ddp, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(self._chunks)
        ]
        self._optimizer = build_optimizer(self._megatron, self._chunks)
        self._schedule = build_schedule(config, self._megatron, self._optimizer)
        self._sum_gradients = self._reduction(config.train.reduction_leaves)
        # the functions that Megatron's pipeline schedules call back, as its own training loop sets them
        # Megatron keeps this configuration for good, so what it calls must not lead to the trainer.
        transformer.finalize_model_grads_func = partial(_finish_gradients, self.work, self._sum_gradients)
        if ddp.overlap_grad_reduce:
            transformer.no_sync_func = _per_chunk([chunk.no_sync for chunk in self._chunks])
        if ddp.overlap_param_gather and ddp.align_param_gather:
            transformer.param_sync_func = _per_chunk([chunk.start_param_sync for chunk in self._chunks])
        ledger = config.determinism.ledger
        self.digests = TrainerDigests(self._parameters, self.layout(), self._optimizer) if ledger else None
        self.offload = Offload(self._chunks, self._optimizer, self.weights().values())
        self.checkpoint = TrainerCheckpoint(
            self._parameters, self.layout(), family, transformer, self._optimizer, self._schedule, self.offload
        )

    def _reduction(self, leaves: int) -> Callable[..., None]:
        return TreeSum(self._chunks, leaves) if leaves else plain_sum

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> TrainResult:
        """Make one optimizer step. A non-finite loss or gradient anywhere makes every rank skip it, see ``skipped``.

        With ``reduction_leaves`` the micro-batches are those of this rank's leaves, the same number for each leaf. The
        learning-rate schedule advances with every update, not with skipped steps.
        """
        self._clear_gradient()
        batches = self._pack(micro_batches)
        outcomes = self._accumulate(batches)
        update = self._update()
        return update.result(*self._scored(batches, outcomes))

    def _clear_gradient(self) -> None:
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

    def _accumulate(self, batches: list[PackedBatch]) -> list[list[Outcome]]:
        """Run the model forward and backward, and sum the gradient; return what came of each leaf."""
        leaves = self._sum_gradients.own_leaves if isinstance(self._sum_gradients, TreeSum) else 1
        size = len(batches) // leaves
        return [
            self._run(batches[start : start + size], self._scoring, self._loss, forward_only=False)
            for start in range(0, len(batches), size)
        ]

    def _update(self) -> Update:
        """Change the weights by the gradient that was summed over all ranks."""
        lr = self._optimizer.param_groups[0]["lr"]
        digests, gradient = self.digests, self.digests.gradient() if self.digests else torch.empty(0)
        norm, updated = update(self._optimizer)
        self._optimizer.zero_grad()  # frees fp32 copies of bf16 gradients, which would stay until the next step
        if updated:
            self._schedule.step(1)
            if self._megatron.ddp.overlap_param_gather:
                # they would arrive in the next forward pass, and the engine reads them before that
                for chunk in self._chunks:
                    chunk.start_param_sync(force_sync=True)
        of_update = UpdateDigests(to_host(gradient), to_host(digests.weights())) if digests else None
        return Update(norm, lr, updated, of_update)

    def _scored(self, batches: list[PackedBatch], outcomes: list[list[Outcome]]) -> tuple[Sums, Scores]:
        """Return the sums of each leaf's loss, and the scores by sequence. Waits for the device."""
        sums = [_sum_over_micro_batches([sums for _, sums in leaf]) for leaf in outcomes]
        return sums, self._per_sequence(batches, [scores for leaf in outcomes for scores, _ in leaf])

    def _loss(self, batch: PackedBatch, outputs: Outputs) -> tuple[Tensor, Outcome]:
        per_token, sums = self._loss_function(*outputs, batch.batch)
        loss = (batch.batch.loss_weights * per_token).sum()
        # The gradient of a loss that is not finite may be finite. The factor makes it NaN, so that all ranks see it in
        # the norm and skip the step together; reading the loss here would wait for the device.
        loss = loss * torch.where(torch.isfinite(loss), 1.0, float("nan"))
        return loss, (outputs[0].detach(), {"loss": loss.detach(), **sums})


def _per_chunk(functions: list[Any]) -> Any:
    return functions if len(functions) > 1 else functions[0]


def _sum_over_micro_batches(sums: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return the sums of all micro-batches, in float64, with one transfer to the host."""
    if not sums:
        return {}
    names = list(sums[0])
    totals = torch.stack([torch.stack([s[name].double() for name in names]) for s in sums]).sum(0)
    return dict(zip(names, totals.tolist()))


def _finish_gradients(work: WorkClock, sum_gradients: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    work.stop()  # from here on ranks wait for other replicas
    sum_gradients(*args, **kwargs)
