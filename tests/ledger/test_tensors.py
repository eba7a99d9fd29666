"""Digests of tensors: the same whatever ranks and optimizers make of them, and never the same after a change."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from miles_spmd.config import Config
from miles_spmd.ledger.rectangles import COLUMN_STREAM, ROW_STREAM, Rectangle, factors, parts, sum_digests
from miles_spmd.ledger.tensor_sums import TensorSums
from miles_spmd.models.layout import Piece, TensorLayout, whole
from tests.ranks import Ranks
from tests.training import cases

ROWS, COLUMNS = 7, 11


def sums(layout: TensorLayout, tensor: torch.Tensor, start: int = 0, stop: int | None = None) -> Any:
    of = TensorSums({"t": parts(layout, tensor.shape, start, stop)})
    return of.rectangles, of({"t": tensor.reshape(-1)[start:stop]}).numpy().view(np.uint64)


def by_hand(matrix: torch.Tensor) -> int:
    """One element at a time, in numbers without end."""
    words = matrix.view(torch.int32 if matrix.element_size() == 4 else torch.int16).tolist()
    a = [int(x) for x in factors(ROW_STREAM, 0, len(words))]
    b = [int(x) for x in factors(COLUMN_STREAM, 0, len(words[0]))]
    mask = (1 << 8 * matrix.element_size()) - 1
    total = sum((word & mask) * a[r] * b[c] for r, row in enumerate(words) for c, word in enumerate(row))
    return total % 2**64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_a_loop(dtype: torch.dtype) -> None:
    matrix = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert sum_digests([sums(TensorLayout("t", whole("w", (ROWS, COLUMNS))), matrix)]) == ({"w": by_hand(matrix)}, [])


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, ROWS * COLUMNS), max_size=5), column=st.integers(0, COLUMNS))
def test_parts_add_up(cuts: list[int], column: int) -> None:
    """Cut between columns, as tensor parallelism does, and each side anywhere, as a distributed optimizer does."""
    matrix = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    ranks = []
    for first, last in ((0, column), (column, COLUMNS)):
        if first < last:
            own = matrix[:, first:last].contiguous()
            layout = TensorLayout("t", (Piece("w", (0, first), (0, 0), tuple(own.shape)),))
            edges = sorted({0, own.numel(), *(cut for cut in cuts if cut < own.numel())})
            ranks += [sums(layout, own, *edge) for edge in itertools.pairwise(edges)]
    assert sum_digests(ranks) == ({"w": by_hand(matrix)}, [])
    assert sum(r.rows * r.columns for rectangles, _ in ranks for r in rectangles) == matrix.numel()


def test_any_bit_counts() -> None:
    layout = TensorLayout("t", whole("w", (ROWS, COLUMNS)))
    matrix = torch.zeros(ROWS, COLUMNS, dtype=torch.int32)
    seen = {by_hand(matrix)}
    for place in range(matrix.numel()):
        for bit in (0, 1, 13, 30, 31):
            matrix.view(-1)[place] = torch.tensor(1 << bit).to(torch.int32)
            seen.add(sum_digests([sums(layout, matrix)])[0]["w"])
            matrix.view(-1)[place] = 0
    assert len(seen) == 1 + 5 * matrix.numel()


def test_replicas_count_once_and_must_agree() -> None:
    held = [Rectangle("norm", 0, 0, 1, 4)]
    same = [(held, np.asarray([5], np.uint64))] * 2
    assert sum_digests(same) == ({"norm": 5}, [])
    assert sum_digests([same[0], (held, np.asarray([6], np.uint64))]) == ({"norm": 5}, ["norm"])


# --- of a trainer, over ranks ----------------------------------------------------------------------------------------


def digests_of(run: Config, batch: list[Any]) -> Any:
    """Of one rank: weights before an update, gradient, weights after it, optimizer's state."""
    trainer = cases.build(run)
    digests = trainer.digests
    assert digests is not None
    before = digests.weights().numpy().view(np.uint64)
    own = [[s] for s in np.array_split(np.arange(len(batch)), trainer.where.dp_size)[trainer.where.dp_rank]]
    result = trainer.train_step([[batch[int(i)] for i in m] for m in own])
    assert result.digests is not None
    after = (digests.of_weights, result.digests.weights)
    state = {kind: (digests.of_updates, values) for kind, values in digests.optimizer_state().items()}
    return {
        "before": (digests.of_weights, before),
        "gradient": (digests.of_updates, result.digests.gradient),
        "after": after,
        **state,
    }


def over_ranks(answers: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    totals = {}
    for kind in answers[0]:
        totals[kind], inconsistent = sum_digests([answer[kind] for answer in answers])
        assert not inconsistent
    return totals


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> dict[str, dict[str, int]]:
    return over_ranks(ranks.run(1, digests_of, run({}), cases.sequences([12] * 4)))


def run(megatron: dict[str, Any]) -> Config:
    return cases.config("qwen3", {"lr": 1e-3} | megatron, train={"reduction_leaves": 4})


def of_checkpoint(config: Config) -> dict[str, int]:
    (file,) = Path(config.model.hf_checkpoint).glob("*.safetensors")
    return {name: by_hand(t.reshape(1, -1) if t.dim() == 1 else t) for name, t in load_file(file).items()}


def test_weights_are_those_of_the_checkpoint(alone: dict[str, dict[str, int]]) -> None:
    expected = of_checkpoint(run({}))
    assert alone["before"] == expected
    assert set(alone) == {"before", "gradient", "after", "main_params", "exp_avg", "exp_avg_sq"}
    assert all(alone[kind].keys() == expected.keys() for kind in alone)
    assert alone["main_params"] == alone["after"] != alone["before"]


@pytest.mark.parametrize("megatron", [{}, cases.ZERO, cases.PP2])
def test_every_layout_has_the_same(ranks: Ranks, alone: dict[str, dict[str, int]], megatron: dict[str, Any]) -> None:
    """The canonical reduction gives the same bits for them, so every digest is the same."""
    assert over_ranks(ranks.run(2, digests_of, run(megatron), cases.sequences([12] * 4))) == alone


def test_weights_under_tensor_parallelism(ranks: Ranks, alone: dict[str, dict[str, int]]) -> None:
    found = over_ranks(ranks.run(2, digests_of, run(cases.TP2 | cases.SP), cases.sequences([12] * 4)))
    assert found["before"] == alone["before"]
    assert found["gradient"].keys() == alone["gradient"].keys()


@pytest.mark.parametrize("megatron", [{}, cases.EP2, cases.TP2 | cases.SP])
def test_experts(ranks: Ranks, megatron: dict[str, Any]) -> None:
    config = cases.config("qwen3_moe", {"lr": 1e-3} | megatron)
    found = over_ranks(ranks.run(2 if megatron else 1, digests_of, config, cases.sequences([12] * 4)))
    assert found["before"] == of_checkpoint(config)
    assert found["gradient"].keys() == found["main_params"].keys() == found["before"].keys()
    assert found["main_params"] == found["after"]
