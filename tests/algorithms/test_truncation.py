"""Top-k and top-p against a loop over sorted tokens, and against transformers where both mean the same."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from miles_spmd.algorithms.truncation import threshold, truncated

ROWS, VOCAB = 40, 23


def scores(seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed))


def kept_by_hand(row: list[float], top_k: int, top_p: float) -> set[int]:
    """Walk down from the likeliest token; equals go together."""
    total = math.fsum(math.exp(x) for x in row)
    kept: set[int] = set()
    for score in sorted(set(row), reverse=True):
        equals = [token for token, x in enumerate(row) if x == score]
        mass = math.fsum(math.exp(row[token]) for token in kept) / total
        if kept and (len(kept) >= (top_k if top_k > 0 else VOCAB) or (mass >= top_p and top_p < 1)):
            break
        kept |= set(equals)
    return kept


@given(
    row=st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12),
    top_k=st.sampled_from([-1, 1, 2, 3, 5, 100]),
    top_p=st.sampled_from([0.01, 0.3, 0.5, 0.77, 0.9, 0.999, 1.0]),
)
def test_against_a_loop(row: list[float], top_k: int, top_p: float) -> None:
    lowest = float(threshold(torch.tensor([row], dtype=torch.float64), top_k, top_p))
    assert {token for token, score in enumerate(row) if score >= lowest} == kept_by_hand(row, top_k, top_p)


@pytest.mark.parametrize("top_k", [1, 4, VOCAB, VOCAB + 5])
def test_top_k_is_that_of_transformers(top_k: int) -> None:
    expected = TopKLogitsWarper(top_k)(None, scores()).log_softmax(-1)
    torch.testing.assert_close(truncated(scores(), top_k, 1.0), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_is_that_of_transformers(top_p: float) -> None:
    expected = TopPLogitsWarper(top_p)(None, scores()).log_softmax(-1)
    torch.testing.assert_close(truncated(scores(), -1, top_p), expected, rtol=0, atol=1e-6)


def test_few_candidates_or_all() -> None:
    """Of 5,000 tokens, peaked rows need few to hold 90 %, the flat ones nearly all."""
    generator = torch.Generator().manual_seed(1)
    many = torch.randn(6, 5000, generator=generator) * torch.tensor([[10.0], [5.0], [3.0], [1.0], [0.1], [0.0]])
    for rows in (many[:2], many):
        expected = TopPLogitsWarper(0.9)(None, rows.double()).log_softmax(-1)
        expected[rows[:, :1].eq(rows).all(-1)] = rows[-1].log_softmax(-1).double()  # equals are kept together
        torch.testing.assert_close(truncated(rows, -1, 0.9).double(), expected, rtol=0, atol=1e-5)


def test_both_cut_the_uncut_distribution() -> None:
    """What is kept is what either keeps alone, whatever the order."""
    both = truncated(scores(), 5, 0.6).isfinite()
    assert torch.equal(both, truncated(scores(), 5, 1.0).isfinite() & truncated(scores(), -1, 0.6).isfinite())


def test_rows_may_differ() -> None:
    top_k = torch.tensor([-1, 1, 3, 1 << 30]).repeat(ROWS // 4)
    top_p = torch.tensor([0.5, 1.0]).repeat_interleave(ROWS // 2)
    together = threshold(scores(), top_k[:, None], top_p[:, None])
    for row, k, p, lowest in zip(scores(), top_k, top_p, together):
        assert torch.equal(threshold(row[None], int(k), float(p))[0], lowest)


def test_without_limits_nothing_is_cut() -> None:
    assert torch.equal(threshold(scores(), -1, 1.0), scores().amin(-1, keepdim=True))


def test_what_is_not_a_number_is_not_hidden() -> None:
    assert truncated(torch.tensor([[0.0, math.nan, 1.0]]), 2, 0.5).isnan().all()
