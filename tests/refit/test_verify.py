from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_spmd.refit.verify import CHUNK_FACTOR, CHUNK_WORDS, checksum, weighted_sum

WORDS = CHUNK_WORDS + 1000  # crosses a chunk boundary


def buffer(words: dict[int, int]) -> torch.Tensor:
    data = torch.full((WORDS,), 1.0).view(torch.int32)  # like norm weights: most bits zero
    for at, value in words.items():
        data[at] = value
    return data.view(torch.uint8)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, WORDS - 1), st.integers(0, 31))
def test_every_single_bit_counts(at: int, bit: int) -> None:
    data = buffer({})
    before = checksum(data), weighted_sum(data)
    data[at * 4 + bit // 8] ^= 1 << (bit % 8)
    assert checksum(data) != before[0]
    assert weighted_sum(data) != before[1]


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, WORDS - 1), min_size=2, max_size=2), st.integers(-(2**31), 2**31 - 1), st.integers(0, 31))
def test_order_counts(places: set[int], value: int, bit: int) -> None:
    first, second = places
    other = value ^ ((1 << bit) - (1 << 32 if bit == 31 else 0))
    one, two = buffer({first: value, second: other}), buffer({first: other, second: value})
    assert checksum(one) != checksum(two)
    assert weighted_sum(one) != weighted_sum(two)


def test_weighted_sum_against_plain_integers() -> None:
    words = torch.randint(-(2**31), 2**31, (WORDS,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    total = 0
    for start in range(0, WORDS, CHUNK_WORDS):
        chunk = words[start : start + CHUNK_WORDS].tolist()
        total = total * CHUNK_FACTOR + sum(word * (2 * at + 1) for at, word in enumerate(chunk))
    assert weighted_sum(words.view(torch.uint8)).item() == (total + 2**63) % 2**64 - 2**63
    assert weighted_sum(torch.empty(0, dtype=torch.uint8)) == 0
