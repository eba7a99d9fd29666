"""One batch in every layout and packing has the same loss and gradient norm; with the canonical reduction gradients are
bitwise equal."""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest

from miles_spmd.config import Config
from miles_spmd.controller.journal.metrics import train_metrics
from miles_spmd.controller.learning.micro_batches import commands, pack, pack_leaves
from miles_spmd.protocol.commands import TrainStep
from miles_spmd.protocol.messages import TrainerRank
from miles_spmd.protocol.results import TrainResult
from miles_spmd.training.trainer import Trainer
from miles_spmd.types.train_sequence import TrainSequence
from tests.pairwise import pairwise
from tests.ranks import Ranks
from tests.training.cases import SP, ZERO, Held, build, config, held, sequences, whole_weights

BATCH = sequences((5, 17, 40, 9, 30, 31, 4, 12, 22, 3, 8, 27, 35), seed=7)
ALGORITHM = {"entropy_coef": 0.05, "kl_loss_coef": 0.1, "eps_clip": 0.5}
FEW_RANKS = 8  # more take a small machine's memory and minutes: pytest -m many_ranks

SIZES = list(product((1, 2, 4), (1, 2), (1, 2), (1, 2)))
USUAL = pairwise([sizes for sizes in SIZES if math.prod(sizes) <= FEW_RANKS])


def marks(sizes: tuple[int, ...]) -> list[pytest.MarkDecorator]:
    if math.prod(sizes) > FEW_RANKS:
        return [pytest.mark.many_ranks, pytest.mark.timeout(1200)]
    return [] if sizes in USUAL else [pytest.mark.slow]


GRID = [pytest.param(sizes, id="DP{}-CP{}-TP{}-PP{}".format(*sizes), marks=marks(sizes)) for sizes in SIZES]


class Cut(NamedTuple):
    """How a batch becomes micro-batches."""

    max_tokens: int
    multiple: int
    order: int  # seed of the order in which sequences are packed; 0: as they come


CUTS = [Cut(300, 1, 0), Cut(64, 1, 1), Cut(90, 4, 2)]


def trainer_rank(trainer: Trainer) -> TrainerRank:
    return TrainerRank(trainer.where.dp_rank, trainer.where.dp_size, trainer.where.reports)


def own_body(trainer: Trainer, batch: list[TrainSequence], cut: Cut | None, leaves: int) -> TrainStep:
    """Return the body of the command that the controller would send to this rank."""
    size = trainer.where.dp_size
    if cut is None:
        lengths = [len(s.tokens) for s in batch]
        packing = pack_leaves(lengths, data_parallel_size=size, leaves=leaves, max_tokens=64)
    else:
        order = np.random.default_rng(cut.order).permutation(len(batch)) if cut.order else range(len(batch))
        batch = [batch[i] for i in order]
        lengths = [len(s.tokens) for s in batch]
        packing = pack(lengths, data_parallel_size=size, max_tokens=cut.max_tokens, multiple=cut.multiple)
    (body,) = commands(packing, batch, [trainer_rank(trainer)], TrainStep)
    return body  # type: ignore[return-value]


class Result(NamedTuple):
    result: TrainResult
    rank: TrainerRank


def steps_of_cuts(run: Config, cuts: list[Cut]) -> list[Result]:
    """One step for each cut, all from the same weights: the learning rate is 0."""
    trainer = build(run)
    results = []
    for cut in cuts:
        result = trainer.train_step(own_body(trainer, BATCH, cut, 0).micro_batches)
        results.append(Result(result, trainer_rank(trainer)))
    return results


def loss_and_norm(ranks: list[Result]) -> tuple[float, float]:
    norms = {r.result.grad_norm for r in ranks}
    assert len(norms) == 1
    return train_metrics([r.result for r in ranks], [r.rank for r in ranks])["train/loss"], norms.pop()


def table(dp: int, cp: int, tp: int, pp: int) -> dict[str, Any]:
    sizes = {
        "context_parallel_size": cp,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "lr": 0.0,
    }
    return sizes | (SP if tp > 1 else {})


@cache
def alone(ranks: Ranks) -> list[tuple[float, float]]:
    (results,) = ranks.run(1, steps_of_cuts, config("qwen3", table(1, 1, 1, 1), algorithm=ALGORITHM), CUTS)
    return [loss_and_norm([result]) for result in results]


@pytest.mark.parametrize("layout", GRID)
def test_loss_and_gradient_norm(ranks: Ranks, layout: tuple[int, int, int, int]) -> None:
    world_size = math.prod(layout)
    run = config("qwen3", table(*layout), algorithm=ALGORITHM)
    per_rank = ranks.run(world_size, steps_of_cuts, run, CUTS, timeout=60 + 60 * world_size)
    expected_loss, expected_norm = alone(ranks)[0]
    assert {len(results) for results in per_rank} == {len(CUTS)}
    for results in zip(*per_rank):
        loss, norm = loss_and_norm(list(results))
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-6)


# --- canonical reduction ---------------------------------------------------------------------------------------------

LEAVES = 4
ADAM = {"lr": 1e-2, "clip_grad": 1.0}


def trained(run: Config, cut: Cut | None) -> tuple[list[Result], Held]:
    """Make three updates; ``cut`` None: with the packing that the canonical reduction requires."""
    trainer = build(run)
    body = own_body(trainer, BATCH, cut, LEAVES)
    results = [Result(trainer.train_step(body.micro_batches), trainer_rank(trainer)) for _ in range(3)]
    return results, held(trainer)


def run_of(
    ranks: Ranks, dp: int, table: dict[str, Any], cut: Cut | None, name: str = "qwen3"
) -> tuple[list[Any], dict[str, np.ndarray]]:
    model_ranks = table.get("tensor_model_parallel_size", 1) * table.get("pipeline_model_parallel_size", 1)
    run = config(name, ADAM | table, algorithm=ALGORITHM, train={"reduction_leaves": 0 if cut else LEAVES})
    per_rank = ranks.run(dp * model_ranks, trained, run, cut)
    steps = [loss_and_norm(list(results)) for results in zip(*(results for results, _ in per_rank))]
    return steps, whole_weights(name, [weights for _, weights in per_rank])


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("qwen3", {}),
        ("qwen3", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        ("qwen3", {"pipeline_model_parallel_size": 2}),
        ("qwen3", ZERO),
        ("qwen3_moe", {}),
    ],
    ids=["", "TP2", "PP2", "distributed-optimizer", "experts"],
)
def test_canonical_reduction_is_bitwise_over_data_parallel_sizes(
    ranks: Ranks, name: str, table: dict[str, Any]
) -> None:
    steps, weights = run_of(ranks, 1, table, None, name)
    for dp in (2, 4):
        same_steps, same_weights = run_of(ranks, dp, table, None, name)
        assert same_steps == steps
        for tensor, value in weights.items():
            assert same_weights[tensor].tobytes() == value.tobytes(), tensor


def test_without_it_weights_are_not_bitwise_equal(ranks: Ranks) -> None:
    """Or the test above could not fail."""
    (_, one), (_, two) = (run_of(ranks, dp, {}, CUTS[0]) for dp in (1, 2))
    assert len(one) > 5
    assert any(one[name].tobytes() != value.tobytes() for name, value in two.items())
    for name, value in two.items():
        np.testing.assert_allclose(one[name], value, rtol=0, atol=2e-3, err_msg=name)


def leaves_that_do_not_divide(run: Config) -> str:
    with pytest.raises(ValueError, match="reduction_leaves") as raised:
        build(run)
    return str(raised.value)


def test_more_ranks_than_leaves(ranks: Ranks) -> None:
    run = config("qwen3", train={"reduction_leaves": 1})
    assert set(ranks.run(2, leaves_that_do_not_divide, run)) == {
        "reduction_leaves 1 is not a multiple of the data-parallel size 2"
    }
