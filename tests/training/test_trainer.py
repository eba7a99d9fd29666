"""What a step must not depend on, and what a step that is skipped must not change."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from miles_spmd.algorithms.losses import SupervisedLoss
from miles_spmd.config import Config
from miles_spmd.models import load_family
from miles_spmd.training import output_layer
from miles_spmd.training.model import unwrap
from miles_spmd.training.trainer import Trainer
from miles_spmd.types.token_batch import TokenBatch
from miles_spmd.types.train_sequence import MicroBatch, TrainSequence
from tests.ranks import Ranks
from tests.training.cases import (
    CP2,
    EP2,
    PLAIN_SGD,
    PP2,
    SP,
    TP2,
    ZERO,
    Held,
    build,
    config,
    held,
    losses,
    sequences,
    share,
    whole_weights,
)

BATCH = sequences((5, 17, 40, 9, 30, 31, 2, 12))
RL = {"algorithm": {"entropy_coef": 0.05, "kl_loss_coef": 0.1}}


def update(run: Config, micro_batches: list[MicroBatch]) -> tuple[dict[str, float], list[np.ndarray] | None, Held]:
    trainer = build(run)
    result = trainer.train_step(micro_batches)
    return result.sums[0], result.log_probs, held(trainer)


@pytest.mark.parametrize("loss_type", ["ppo", "gspo"])
@pytest.mark.parametrize("layout", [{}, CP2, TP2 | SP], ids=["one", "CP2", "TP2+SP"])
def test_packing_changes_nothing(ranks: Ranks, layout: dict[str, Any], loss_type: str) -> None:
    algorithm = RL["algorithm"] | {"loss_type": loss_type, "eps_clip": 0.5}
    run = config("qwen3", layout | PLAIN_SGD, algorithm=algorithm)
    order = np.random.default_rng(1).permutation(len(BATCH))
    packings = [
        ([[s] for s in BATCH], range(len(BATCH))),
        ([BATCH], range(len(BATCH))),
        ([[BATCH[i] for i in order[:3]], [BATCH[i] for i in order[3:]]], order),
    ]
    outcomes = []
    for micro_batches, positions in packings:
        per_rank = ranks.run(2 if layout else 1, update, run, micro_batches)
        loss = sum(sums["loss"] for sums, log_probs, _ in per_rank if log_probs is not None)
        by_position = dict(zip(positions, per_rank[0][1], strict=True))
        outcomes.append((loss, by_position, whole_weights("qwen3", [h for _, _, h in per_rank])))
    for loss, log_probs, weights in outcomes[1:]:
        assert loss == pytest.approx(outcomes[0][0], abs=1e-6)
        for position, values in log_probs.items():
            np.testing.assert_allclose(values, outcomes[0][1][position], rtol=0, atol=3e-6)
        for name, value in weights.items():
            np.testing.assert_allclose(value, outcomes[0][2][name], rtol=0, atol=2e-6, err_msg=name)


def test_a_sequences_tokens_share_one_ratio(ranks: Ranks) -> None:
    """GSPO against the formula: each trained token of a sequence has the loss of the sequence's mean log-ratio."""
    sequence = msgspec.structs.replace(BATCH[2], advantages=np.full(40, -0.7, np.float32))
    run = config("qwen3", CP2, algorithm={"loss_type": "gspo", "eps_clip": 1e9})
    per_rank = ranks.run(2, update, run, [[sequence]])
    trained = sequence.loss_weights != 0
    ratio = np.exp((per_rank[0][1][0] - sequence.old_log_probs)[trained].astype(np.float64).mean())
    expected = sequence.loss_weights[trained].astype(np.float64).sum() * 0.7 * ratio
    assert sum(sums["loss"] for sums, _, _ in per_rank) == pytest.approx(expected, rel=1e-5)


def without_weight(sequence: TrainSequence) -> TrainSequence:
    return msgspec.structs.replace(sequence, loss_weights=np.zeros_like(sequence.loss_weights))


def idle_rank(run: Config, batch: list[TrainSequence]) -> tuple[dict[str, float], Held]:
    """Data-parallel rank 1 has a sequence without weight, and one of a single token."""
    trainer = build(run)
    idle = [
        without_weight(batch[0]),
        msgspec.structs.replace(batch[0], **{f: getattr(batch[0], f)[:1] for f in FIELDS}),
    ]
    result = trainer.train_step([batch if trainer.where.dp_rank == 0 else idle])
    return result.sums[0], held(trainer)


FIELDS = ("tokens", "loss_weights", "advantages", "old_log_probs", "ref_log_probs")


def test_rank_without_trained_tokens_adds_nothing(ranks: Ranks) -> None:
    run = config("qwen3", PLAIN_SGD, **RL)
    (busy, with_idle), (idle, _) = ranks.run(2, idle_rank, run, BATCH)
    assert set(idle) == set(busy)
    assert set(idle.values()) == {0.0}
    ((alone, _, by_itself),) = ranks.run(1, update, run, [BATCH])
    assert busy == alone
    for name, value in with_idle.weights.items():
        np.testing.assert_array_equal(value, by_itself.weights[name])


def poisoned(kind: str) -> list[TrainSequence]:
    """BATCH with one bad number, in the first sequence alone."""
    first = msgspec.structs.replace(BATCH[0], advantages=BATCH[0].advantages.copy())
    if kind == "infinite loss":
        first.advantages[-1] = np.inf
    if kind == "loss is not a number":
        first.advantages[-1] = np.nan
    if kind == "mark":
        first.advantages[-1] = 1e38
    return [first, *BATCH[1:]]


def bad_step_between(run: Config, bad: list[TrainSequence], insert: bool) -> tuple[list[Any], list[Held], list[bool]]:
    """A good step, perhaps a bad one, two good ones; weights before and after the bad one, and at the end."""
    trainer = build(run)
    good, weights, results = share(BATCH, trainer), [], [trainer.train_step(share(BATCH, trainer))]
    weights.append(held(trainer))
    if insert:
        results.append(trainer.train_step(share(bad, trainer)))
        weights.append(held(trainer))
    results += [trainer.train_step(good), trainer.train_step(good)]
    summary = [(r.skipped, r.grad_norm, r.lr, r.sums) for r in results]
    return summary, [*weights, held(trainer)], [trainer.where.reports]


ADAM = {"lr": 1e-2, "clip_grad": 1.0}
SCHEDULE = {"run": {"num_rollout": 4}, "train": {"lr_warmup_iters": 1, "lr_decay_style": "linear", "min_lr": 1e-3}}


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ({}, "infinite loss"),
        ({}, "loss is not a number"),
        (ZERO, "infinite loss"),
        (TP2, "infinite loss"),
        (PP2, "loss is not a number"),
        (CP2, "infinite loss"),
    ],
    ids=["DP2-inf", "DP2-nan", "DP2+distributed-inf", "TP2-inf", "PP2-nan", "CP2-inf"],
)  # every rank must come to the same decision
def test_bad_step_is_skipped_everywhere(ranks: Ranks, layout: dict[str, Any], kind: str) -> None:
    run = config("qwen3", layout | ADAM, **RL, **SCHEDULE)
    with_bad = ranks.run(2, bad_step_between, run, poisoned(kind), True)
    without = ranks.run(2, bad_step_between, run, poisoned(kind), False)
    reasons = {results[1][0] for results, _, _ in with_bad}
    assert "non-finite loss" in reasons
    assert reasons <= {"non-finite loss", "non-finite gradient"}
    for (results, weights, _), (expected, expected_weights, _) in zip(with_bad, without):
        assert not np.isfinite(results[1][1])
        for name, value in weights[0].weights.items():
            np.testing.assert_array_equal(value, weights[1].weights[name])
            np.testing.assert_array_equal(weights[2].weights[name], expected_weights[1].weights[name])
        assert [results[0], *results[2:]] == expected  # moments and schedule too: the rest of the run is the same run
        assert [lr for _, _, lr, _ in expected] == pytest.approx([0.0, 1e-2, 7e-3])


class ExplodingGradient(SupervisedLoss):
    """Adds a term of value 0, whose gradient is so large on marked tokens that its norm overflows fp32."""

    def __call__(self, log_probs: Tensor, entropy: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, sums = super().__call__(log_probs, entropy, tokens)
        return loss + (log_probs - log_probs.detach()) * torch.where(marked(tokens), 1e38, 0.0), sums


class ConstantInfinity(SupervisedLoss):
    """Adds infinity on marked tokens, which has no gradient at all."""

    def __call__(self, log_probs: Tensor, entropy: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, sums = super().__call__(log_probs, entropy, tokens)
        return loss + torch.where(marked(tokens), torch.inf, 0.0), sums


def marked(tokens: TokenBatch) -> Tensor:
    return tokens.required("advantages") > 1e30


def mark_on_one_rank(run: Config, loss: type[SupervisedLoss]) -> tuple[str, float, bool]:
    trainer = Trainer(run, load_family(run.model.hf_checkpoint), loss())
    before = held(trainer).weights
    result = trainer.train_step([poisoned("mark") if trainer.where.dp_rank == 0 else BATCH])
    same = all(np.array_equal(value, before[name]) for name, value in held(trainer).weights.items())
    return result.skipped, result.sums[0]["loss"], same


def test_finite_loss_with_overflowing_gradient(ranks: Ranks) -> None:
    for skipped, loss, same in ranks.run(2, mark_on_one_rank, config("qwen3", ADAM, **RL), ExplodingGradient):
        assert (skipped, same) == ("non-finite gradient", True)
        assert np.isfinite(loss)


def test_infinite_loss_with_finite_gradient(ranks: Ranks) -> None:
    bad, good = ranks.run(2, mark_on_one_rank, config("qwen3", ADAM, **RL), ConstantInfinity)
    assert (bad[0], bad[2]) == ("non-finite loss", True)
    assert (good[0], good[2]) == ("non-finite gradient", True)
    assert not np.isfinite(bad[1])
    assert np.isfinite(good[1])


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}


@pytest.mark.parametrize("recompute", [FULL, SELECTIVE], ids=["full", "selective"])
def test_recomputation_is_exact(ranks: Ranks, recompute: dict[str, Any]) -> None:
    ((_, _, stored),) = ranks.run(1, update, config("qwen3", PLAIN_SGD, **RL), [BATCH[:3], BATCH[3:]])
    ((_, _, recomputed),) = ranks.run(1, update, config("qwen3", recompute | PLAIN_SGD, **RL), [BATCH[:3], BATCH[3:]])
    for name, value in stored.weights.items():
        np.testing.assert_array_equal(value, recomputed.weights[name], err_msg=name)


def update_with_little_memory(run: Config, micro_batches: list[MicroBatch]) -> Any:
    """At most 10 positions' logits at once."""
    output_layer.MAX_LOGITS, usual = 10 * 98, output_layer.MAX_LOGITS
    try:
        return update(run, micro_batches)
    finally:
        output_layer.MAX_LOGITS = usual


@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied"])
@pytest.mark.parametrize("layout", [{}, TP2, TP2 | SP], ids=["DP2", "TP2", "TP2+SP"])
def test_logits_in_parts_change_nothing(ranks: Ranks, layout: dict[str, Any], name: str) -> None:
    run = config(name, layout | PLAIN_SGD, rollout={"rollout_temperature": 0.7}, **RL)
    at_once, in_parts = (ranks.run(2, f, run, [BATCH]) for f in (update, update_with_little_memory))
    assert any(log_probs for _, log_probs, _ in at_once)
    for (_, log_probs, weights), (_, same_log_probs, same_weights) in zip(at_once, in_parts):
        assert (log_probs is None) == (same_log_probs is None)
        for ours, theirs in zip(log_probs or (), same_log_probs or ()):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
        for tensor, value in weights.weights.items():
            np.testing.assert_allclose(same_weights.weights[tensor], value, rtol=0, atol=1e-6, err_msg=tensor)


def bf16_run(run: Config, steps: int) -> list[float]:
    trainer = build(run)
    assert {w.dtype for w in trainer.weights().values()} == {torch.bfloat16}
    return [trainer.train_step(share(BATCH, trainer, 2)).sums[0]["loss"] for _ in range(steps)]


@pytest.mark.parametrize("layout", [{}, ZERO, TP2 | SP], ids=["DP2", "DP2+distributed", "TP2+SP"])
def test_bf16_keeps_small_updates(ranks: Ranks, layout: dict[str, Any]) -> None:
    """Updates of 1e-4 are far below bf16's resolution of weights around 1: without fp32 copies most would be lost."""
    sft = {"run": {"mode": "sft", "num_rollout": 30}}
    run = config("qwen3", layout | {"lr": 1e-4}, model={"dtype": "bfloat16"}, **sft)
    in_bf16 = np.sum(ranks.run(2, bf16_run, run, 30), 0) / (1 if "tensor_model_parallel_size" not in layout else 2)
    (first, *_, last) = ranks.run(1, losses, config("qwen3", {"lr": 1e-4}, **sft), BATCH, 30, 2)[0]
    assert in_bf16[0] == pytest.approx(first, rel=2e-3)
    assert in_bf16[-1] - in_bf16[0] == pytest.approx(last - first, rel=0.1)


def weights_after_update(run: Config, batch: list[TrainSequence]) -> Held:
    trainer = build(run)
    trainer.train_step(share(batch, trainer))
    return held(trainer)


def test_weights_are_complete_after_an_update(ranks: Ranks) -> None:
    """Even where Megatron would gather them during the next forward pass: the engine reads them before."""
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    late, plain = (
        whole_weights("qwen3", ranks.run(2, weights_after_update, config("qwen3", ZERO | ADAM | more, **RL), BATCH))
        for more in (overlap, {})
    )
    for name, value in plain.items():
        np.testing.assert_array_equal(late[name], value)


def drop_a_trainer(run: Config) -> bool:
    trainer = build(run)
    trainer.train_step(share(BATCH, trainer))
    model = weakref.ref(unwrap(trainer._chunks[0]))
    del trainer
    gc.collect()
    return model() is None


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_a_trainer_that_is_dropped_is_gone(ranks: Ranks, name: str) -> None:
    assert ranks.run(2, drop_a_trainer, config(name, EP2 if "moe" in name else {})) == [True, True]
