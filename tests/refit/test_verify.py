from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_spmd.refit.verify import CHUNK_WORDS, checksum

WORDS = 3 * CHUNK_WORDS // 2  # crosses a chunk boundary


def buffer(words: dict[int, int]) -> torch.Tensor:
    data = torch.full((WORDS,), 1.0).view(torch.int32)  # like norm weights: most bits zero
    for at, value in words.items():
        data[at] = value
    return data.view(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, WORDS - 1), st.integers(0, 31))
def test_every_single_bit_counts(at: int, bit: int) -> None:
    data = buffer({})
    before = checksum(data)
    data[at * 4 + bit // 8] ^= 1 << (bit % 8)
    assert checksum(data) != before


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.integers(0, WORDS - 1), min_size=2, max_size=2),
    st.integers(-(2**31), 2**31 - 1),
    st.integers(0, 31),
)
def test_order_counts(places: set[int], value: int, bit: int) -> None:
    first, second = places
    other = value ^ ((1 << bit) - (1 << 32 if bit == 31 else 0))
    assert checksum(buffer({first: value, second: other})) != checksum(buffer({first: other, second: value}))


def test_against_plain_integers() -> None:
    words = torch.randint(
        -(2**31), 2**31, (CHUNK_WORDS + 1000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0)
    )
    total = sum(word * (2 * at + 1) for at, word in enumerate(words.tolist()))
    assert checksum(words.view(torch.uint8)).item() == (total + 2**63) % 2**64 - 2**63
    assert checksum(torch.empty(0, dtype=torch.uint8)) == 0
