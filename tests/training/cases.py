"""Models, batches and layouts of the trainer's tests, functions that run on each rank, and transformers as the
oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from miles_spmd.algorithms.losses import make_loss
from miles_spmd.config import Config
from miles_spmd.models import Family, TensorLayout, load_family
from miles_spmd.models.blocks import Mixture
from miles_spmd.training.background_save import BackgroundSave
from miles_spmd.training.checkpoint import TrainerCheckpointError
from miles_spmd.training.trainer import Trainer
from miles_spmd.types.train_sequence import MicroBatch, TrainSequence
from tests.models import tiny

VOCAB = tiny.COMMON["vocab_size"]

TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {"virtual_pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
ETP1 = {"expert_tensor_parallel_size": 1}
ZERO = {"use_distributed_optimizer": True}
PLAIN_SGD = {"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.0, "clip_grad": 0.0}  # the update is the gradient


def config(name: str, megatron: dict[str, Any] | None = None, **tables: Any) -> Config:
    """Return the configuration of a run from the tiny checkpoint ``name``, by default in fp32."""
    model = {"hf_checkpoint": str(tiny.checkpoint(name)), "dtype": "float32"} | tables.pop("model", {})
    return Config(model=model, data={"prompt_data": "none"}, megatron=megatron or {}, **tables)


def build(run: Config) -> Trainer:
    return Trainer(run, load_family(run.model.hf_checkpoint), make_loss(run.run.mode, run.algorithm))


def save(trainer: Trainer, folder: str | Path) -> list[str]:
    """Write the trainer's checkpoint; return the digests of all ranks' indexes."""
    saving, folder = BackgroundSave(), Path(folder)
    saving.start(folder.parent, {folder.name: trainer.checkpoint.content()})
    progress = saving.progress(wait=True)
    if progress.problem:
        raise TrainerCheckpointError(progress.problem)
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, progress.digests[folder.name])
    return digests


def sequences(lengths: Iterable[int], seed: int = 0) -> list[TrainSequence]:
    """Random tokens; about the first third of each is a prompt, and a token in the middle is masked."""
    rng = np.random.default_rng(seed)

    def one(length: int) -> TrainSequence:
        weights = rng.uniform(0.01, 0.03, length).astype(np.float32)
        weights[: length // 3] = weights[length // 2] = 0
        advantages, old, ref = (rng.normal(size=length).astype(np.float32) for _ in range(3))
        tokens = rng.integers(0, VOCAB, length).astype(np.int32)
        return TrainSequence(tokens, weights, advantages, None, 0.3 * old - 4.5, 0.3 * ref - 4.5)

    return [one(length) for length in lengths]


def share(batch: Sequence[TrainSequence], trainer: Trainer, micro_batches: int = 2) -> list[MicroBatch]:
    """Return this data-parallel rank's sequences of ``batch``, distributed over micro-batches."""
    own = list(batch)[trainer.where.dp_rank :: trainer.where.dp_size]
    return [own[i::micro_batches] for i in range(micro_batches)]


def unshare(batch: Sequence[TrainSequence], ranks: Sequence[Any], micro_batches: int = 2) -> list[np.ndarray]:
    """Return per-sequence arrays in the order of ``batch``, from the ranks that have them; these must agree."""
    ordered: dict[int, np.ndarray] = {}
    for rank in ranks:
        if rank.log_probs is None:
            continue
        own = range(rank.dp_rank, len(batch), rank.dp_size)
        order = [index for i in range(micro_batches) for index in own[i::micro_batches]]
        for index, values in zip(order, rank.log_probs, strict=True):
            np.testing.assert_array_equal(values, ordered.setdefault(index, values))
    return [ordered[i] for i in range(len(batch))]


# --- on a rank --------------------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """A rank's weights, for :func:`whole_weights`."""

    weights: dict[str, np.ndarray]
    layout: list[TensorLayout]


class Step(NamedTuple):
    log_probs: list[np.ndarray] | None
    dp_rank: int
    dp_size: int
    sums: dict[str, float]  # of reporting ranks, else empty
    grad_norm: float
    before: Held
    after: Held


def held(trainer: Trainer) -> Held:
    return Held({name: w.float().cpu().numpy().copy() for name, w in trainer.weights().items()}, trainer.layout())


def one_step(run: Config, batch: list[TrainSequence], micro_batches: int) -> Step:
    """Run the batch forward only, then make one update."""
    trainer = build(run)
    own = share(batch, trainer, micro_batches)
    log_probs = trainer.log_probs(own).log_probs
    before = held(trainer)
    result = trainer.train_step(own)
    assert not result.skipped
    assert (log_probs is None) == (result.log_probs is None) == (not trainer.where.reports)
    for a, b in zip(log_probs or [], result.log_probs or []):
        np.testing.assert_array_equal(a, b)  # the training forward is the same forward
    sums = result.sums[0] if trainer.where.reports else {}
    where = (trainer.where.dp_rank, trainer.where.dp_size)
    return Step(log_probs, *where, sums, result.grad_norm, before, held(trainer))


def losses(run: Config, batch: list[TrainSequence], steps: int, micro_batches: int) -> list[float]:
    """Return the loss of each of ``steps`` updates on the same batch, over all ranks."""
    trainer = build(run)
    own = share(batch, trainer, micro_batches)
    return [global_loss(trainer, trainer.train_step(own).sums[0]) for _ in range(steps)]


def global_loss(trainer: Trainer, sums: dict[str, float]) -> float:
    total = torch.tensor(sums["loss"] if trainer.where.reports else 0.0, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


# --- the oracle -------------------------------------------------------------------------------------------------------


def oracle_scores(model: Any, tokens: np.ndarray, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return transformers' log-prob of every token (0 for the first) and the entropy of its distribution."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    log_p = (model(input_ids=ids[None]).logits[0, :-1].float() / temperature).log_softmax(-1)
    first = torch.zeros(1)
    return torch.cat((first, log_p.gather(1, ids[1:, None])[:, 0])), torch.cat((first, -(log_p.exp() * log_p).sum(-1)))


def oracle_gradient(
    name: str,
    batch: Iterable[TrainSequence],
    loss_of: Callable[[TrainSequence, Tensor, Tensor], Tensor],
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, dict[str, np.ndarray]]:
    """Return the sum of ``loss_of(sequence, log_probs, entropy)`` and its gradient by checkpoint tensor, computed by
    transformers in fp32 with weights of ``dtype``."""
    model = tiny.build(name, dtype).float()
    total = torch.stack([loss_of(s, *oracle_scores(model, s.tokens, temperature)) for s in batch]).sum()
    total.backward()
    gradients = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    return total.item(), _on_disk(gradients, load_family(tiny.checkpoint(name)))


def _on_disk(tensors: dict[str, np.ndarray], family: Family) -> dict[str, np.ndarray]:
    """Return the tensors by the names that they have on disk, where experts are not stacked."""
    out: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        prefix, _, stacked = name.rpartition(".mlp.experts.")
        mixture = family.layers[int(prefix.rpartition(".")[2])].mlp if prefix else None
        if not isinstance(mixture, Mixture):
            out[name.replace(".mlp.gate.", f".{family.layers[0].mlp.name}.gate.")] = value
            continue
        for expert, matrix in zip(mixture.experts, value, strict=True):
            gate, up, down = (f"{prefix}.{expert.name}.{leaf}" for leaf in expert.names)
            out |= dict(zip((gate, up), np.split(matrix, 2))) if stacked == "gate_up_proj" else {down: matrix}
    return out


def whole_weights(name: str, ranks: Iterable[Held], value_head: bool = False) -> dict[str, np.ndarray]:
    """Return checkpoint tensors, put together from what every rank holds. What two ranks hold must be bitwise equal."""
    shapes = load_family(tiny.checkpoint(name), value_head=value_head).checkpoint_tensors()
    whole = {tensor: np.full(shape, np.nan, np.float32) for tensor, shape in shapes.items()}
    for rank in ranks:
        for layout in rank.layout:
            for piece in layout.pieces:
                part = rank.weights[layout.local_name][
                    (*piece.lead, *(slice(a, a + n) for a, n in zip(piece.local, piece.shape)))
                ]
                if not piece.name:
                    assert not part.any(), f"padding of {layout.local_name} is not zero"
                    continue
                present = whole[piece.name][tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape))]
                known = ~np.isnan(present)
                np.testing.assert_array_equal(part[known], present[known], err_msg=layout.local_name)
                present[...] = part
    assert not [tensor for tensor, value in whole.items() if np.isnan(value).any()]
    return whole
