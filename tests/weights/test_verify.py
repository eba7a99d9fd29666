from __future__ import annotations

import os
import subprocess
import sys

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_spmd.weights.checksums import checksum

WORDS = 100_000


def buffer(words: dict[int, int]) -> torch.Tensor:
    data = torch.full((WORDS,), 1.0).view(torch.int32)  # like norm weights: most bits zero
    for at, value in words.items():
        data[at] = value
    return data.view(torch.uint8)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, WORDS - 1), st.integers(0, 31))
def test_every_single_bit_counts(at: int, bit: int) -> None:
    data = buffer({})
    before = checksum(data)
    data[at * 4 + bit // 8] ^= 1 << (bit % 8)
    assert checksum(data) != before


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, WORDS - 1), min_size=2, max_size=2), st.integers(-(2**31), 2**31 - 1), st.integers(0, 31))
def test_order_counts(places: set[int], value: int, bit: int) -> None:
    first, second = places
    other = value ^ ((1 << bit) - (1 << 32 if bit == 31 else 0))
    assert checksum(buffer({first: value, second: other})) != checksum(buffer({first: other, second: value}))


ON_A_GPU = """
import torch

from miles_spmd.weights import copy_kernel as module

module.COLUMNS, module.ROWS = 64, 4
generator = torch.Generator().manual_seed(0)
for count in (0, 1, 63, 64, 256, 257, 1000):
    words = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, generator=generator)
    expected = sum((word % 2**32) * (2 * at + 1) for at, word in enumerate(words.tolist())) % 2**64
    found = module.word_sum(words.view(torch.uint8))
    assert found.dim() == 0 and found.item() % 2**64 == expected, (count, found, expected)
print("done")
"""


def test_sum_over_words_against_plain_integers() -> None:
    """The kernel, run by Triton's interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", ON_A_GPU]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.strip() == "done", done.stderr
