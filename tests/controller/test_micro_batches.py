from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_spmd.controller.learning.micro_batches import FILLER, commands, expand, in_sequence_order, pack, pack_leaves
from miles_spmd.protocol.commands import ComputeLogProbs
from miles_spmd.protocol.messages import TrainerRank
from miles_spmd.types.train_sequence import TrainSequence


@given(
    st.lists(st.integers(2, 50), min_size=1, max_size=40), st.integers(1, 4), st.integers(50, 120), st.integers(1, 2)
)
def test_every_sequence_once_within_budget_and_ranks_in_step(
    lengths: list[int], replicas: int, budget: int, multiple: int
) -> None:
    packing = pack(lengths, data_parallel_size=replicas, max_tokens=budget, multiple=multiple)
    flat = [i for rank in packing for micro in rank for i in micro]
    assert sorted(i for i in flat if i != FILLER) == list(range(len(lengths)))
    assert all(micro for rank in packing for micro in rank)
    assert all(sum(lengths[i] for i in micro if i != FILLER) <= budget for rank in packing for micro in rank)
    counts = {len(rank) for rank in packing}
    assert len(counts) == 1
    assert counts.pop() % multiple == 0


def test_balance() -> None:
    packing = pack([10, 9, 8, 7, 6, 5, 4, 3], data_parallel_size=2, max_tokens=100)
    loads = [sum([10, 9, 8, 7, 6, 5, 4, 3][i] for micro in rank for i in micro) for rank in packing]
    assert max(loads) - min(loads) <= 2


def test_sequence_over_budget_is_named() -> None:
    with pytest.raises(ValueError, match=r"sequence 1 has 60 tokens.*\(50\); raise max_tokens_per_gpu"):
        pack([10, 60], data_parallel_size=1, max_tokens=50)


def test_results_come_back_in_the_order_of_the_sequences() -> None:
    sequences = [TrainSequence(np.arange(n, dtype=np.int32), np.ones(n, np.float32)) for n in (5, 2, 7)]
    packing = pack([5, 2, 7], data_parallel_size=2, max_tokens=7, multiple=2)  # four bins for three: one filler
    ranks = [TrainerRank(replica, 2, reports) for replica in (0, 1) for reports in (True, False)]
    sent = commands(packing, sequences, ranks, ComputeLogProbs)
    assert sent[0] == sent[1]
    weights = [s.loss_weights.sum() for b in sent[::2] for micro in b.micro_batches for s in micro]  # type: ignore[union-attr]
    assert sorted(weights) == [0, 2, 5, 7]
    results = [
        [s.tokens * 10.0 for micro in body.micro_batches for s in micro] if rank.reports else None  # type: ignore[union-attr]
        for rank, body in zip(ranks, sent)
    ]
    for sequence, values in zip(sequences, in_sequence_order(packing, ranks, results, 3)):
        np.testing.assert_array_equal(values, sequence.tokens * 10.0)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(2, 50), min_size=1, max_size=40),
    budget=st.integers(1, 120),
    multiple=st.integers(1, 2),
)
def test_leaves_are_the_same_for_every_data_parallel_size(lengths: list[int], budget: int, multiple: int) -> None:
    shape: dict[str, int] = {"leaves": 4, "max_tokens": budget, "multiple": multiple}
    (everything,) = pack_leaves(lengths, data_parallel_size=1, **shape)
    real = [[i for i in micro if i != FILLER] for micro in everything]
    assert all(len(micro) <= 1 or sum(lengths[i] for i in micro) <= max(budget, *lengths) for micro in real)
    size = len(everything) // 4
    leaves = [sorted(itertools.chain(*real[start : start + size])) for start in range(0, len(real), size)]
    assert leaves == [share.tolist() for share in np.array_split(np.arange(len(lengths)), 4)]
    assert len(everything) % (4 * multiple) == 0
    for replicas in (2, 4):
        ranks = pack_leaves(lengths, data_parallel_size=replicas, **shape)
        assert [micro for rank in ranks for micro in rank] == everything
        assert len({len(rank) for rank in ranks}) == 1


def test_pairs_stay_together() -> None:
    pairs = pack([30, 8, 20], data_parallel_size=2, max_tokens=30, multiple=2)
    micro_batches = [micro for rank in expand(pairs, 2) for micro in rank]
    assert sorted(i for micro in micro_batches for i in micro) == [FILLER, FILLER, 0, 1, 2, 3, 4, 5]
    for micro in micro_batches:
        assert all(
            first == second == FILLER or (first % 2, second) == (0, first + 1)
            for first, second in zip(micro[::2], micro[1::2], strict=True)
        )
