from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_spmd.controller.packing import FILLER, bodies, in_sequence_order, pack
from miles_spmd.data.sample import TrainSequence
from miles_spmd.messaging.wire import ComputeLogProbs, LogProbsResult, RankInfo


def info(rank: int, dp_rank: int, dp_size: int, reports: bool) -> RankInfo:
    return RankInfo(rank, 4, "host", 1, dp_rank, dp_size, reports, engine=rank, engine_leader=True)


@given(
    st.lists(st.integers(2, 50), min_size=1, max_size=40), st.integers(1, 4), st.integers(50, 120), st.integers(1, 2)
)
def test_every_sequence_once_within_budget_and_ranks_in_step(
    lengths: list[int], replicas: int, budget: int, multiple: int
) -> None:
    packing = pack(lengths, data_parallel_size=replicas, max_tokens=budget, multiple=multiple)
    flat = [i for rank in packing.bins for micro in rank for i in micro]
    assert sorted(i for i in flat if i != FILLER) == list(range(len(lengths)))
    assert all(micro for rank in packing.bins for micro in rank)
    assert all(sum(lengths[i] for i in micro if i != FILLER) <= budget for rank in packing.bins for micro in rank)
    counts = {len(rank) for rank in packing.bins}
    assert len(counts) == 1
    assert counts.pop() % multiple == 0


def test_balance() -> None:
    packing = pack([10, 9, 8, 7, 6, 5, 4, 3], data_parallel_size=2, max_tokens=100)
    loads = [sum([10, 9, 8, 7, 6, 5, 4, 3][i] for micro in rank for i in micro) for rank in packing.bins]
    assert max(loads) - min(loads) <= 2


def test_sequence_over_budget_is_named() -> None:
    with pytest.raises(ValueError, match=r"sequence 1 has 60 tokens.*\(50\); raise max_tokens_per_gpu"):
        pack([10, 60], data_parallel_size=1, max_tokens=50)


def test_answers_find_back_to_their_sequences() -> None:
    sequences = [TrainSequence(np.arange(n, dtype=np.int32), np.ones(n, np.float32)) for n in (5, 2, 7)]
    packing = pack([5, 2, 7], data_parallel_size=2, max_tokens=7, multiple=2)  # four bins for three: one filler
    infos = [info(0, 0, 2, True), info(1, 0, 2, False), info(2, 1, 2, True), info(3, 1, 2, False)]
    sent = bodies(packing, sequences, infos, ComputeLogProbs)
    assert sent[0] == sent[1]
    weights = [s.loss_weights.sum() for b in sent[::2] for micro in b.micro_batches for s in micro]  # type: ignore[union-attr]
    assert sorted(weights) == [0, 2, 5, 7]
    results = [
        LogProbsResult([s.tokens * 10.0 for micro in body.micro_batches for s in micro] if i.reports else None)  # type: ignore[union-attr]
        for i, body in zip(infos, sent)
    ]
    for sequence, values in zip(sequences, in_sequence_order(packing, infos, results, 3)):
        np.testing.assert_array_equal(values, sequence.tokens * 10.0)
