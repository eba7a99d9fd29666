"""The compiled attention against torch in float64, with every key in its place and in pages; rows do not know of each
other."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miles_spmd.invariant import compiled
from tests.invariant.compiled_paths import kernels, needs_build

HEADS = [(1, 1), (4, 4), (4, 2), (6, 2), (3, 1), (8, 1)]  # of queries, of keys


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    scale: float,
    slots: Tensor | None = None,
) -> Tensor:
    """What :func:`compiled.attention` computes, in the numbers that it is given."""
    if slots is not None:
        key, value = key[slots.long()], value[slots.long()]
    share = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(share, 1) for x in (key, value))
    outputs = []
    for queries, keys in zip(itertools.pairwise(query_starts), itertools.pairwise(key_starts)):
        q, k, v = query[slice(*queries)], key[slice(*keys)], value[slice(*keys)]
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        seen = torch.ones(scores.shape[1:]).tril(len(k) - len(q)).bool()
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@needs_build
@settings(max_examples=60, deadline=None)
@given(
    # new tokens, and keys before them: a context-parallel rank's blocks and an engine's prefixes have some
    st.lists(st.tuples(st.integers(1, 70), st.sampled_from([0, 0, 1, 40, 130])), min_size=1, max_size=5),
    st.sampled_from(HEADS),
    st.sampled_from([8, 16, 24, 64, 128]),
)
def test_values_and_gradients(lengths: list[tuple[int, int]], heads: tuple[int, int], dim: int) -> None:
    at = starts([new for new, _ in lengths]), starts([new + before for new, before in lengths])
    shapes = [(int(at[i][-1]), heads[i], dim) for i in (0, 1, 1)]
    inputs, gradient = [torch.randn(shape, requires_grad=True) for shape in shapes], torch.randn(shapes[0])
    actual = compiled.attention(*inputs, *at, dim**-0.5)
    expected = reference(*(x.double() for x in inputs), *at, dim**-0.5)
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=0)
    ours, theirs = (torch.autograd.grad((out * gradient).sum(), inputs) for out in (actual, expected))
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@needs_build
@pytest.mark.parametrize("heads", HEADS)
def test_pages(heads: tuple[int, int]) -> None:
    """Keys anywhere in a cache, of which the rest is not to be touched."""
    query_starts, key_starts = starts([3, 1, 70, 1]), starts([3, 90, 129, 33])
    query = torch.randn(75, heads[0], 16)
    slots = torch.randperm(400, generator=torch.Generator().manual_seed(0))[: int(key_starts[-1])].int()
    key, value = (torch.full((400, heads[1], 16), torch.nan) for _ in range(2))
    key[slots.long()], value[slots.long()] = torch.randn(2, len(slots), heads[1], 16)
    actual = compiled.attention(query, key, value, query_starts, key_starts, 0.3, slots)
    expected = reference(*(x.double() for x in (query, key, value)), query_starts, key_starts, 0.3, slots)
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=0)


@needs_build
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dim", [8, 64])
def test_rows_are_the_same_bits_in_any_batch(heads: tuple[int, int], dim: int) -> None:
    """A sequence alone, among others, and one token at a time over a cache; its gradients alone and among others."""
    lengths = [37, 150, 1, 20]
    at = starts(lengths)
    query, gradient = (torch.randn(int(at[-1]), heads[0], dim) for _ in range(2))
    key, value = (torch.randn(int(at[-1]), heads[1], dim) for _ in range(2))

    def run(rows: slice, at: Tensor) -> tuple[Tensor, ...]:
        inputs = [x[rows].clone().requires_grad_() for x in (query, key, value)]
        out = compiled.attention(*inputs, at, at, 0.2)
        return out, *torch.autograd.grad(out, inputs, gradient[rows])

    whole = run(slice(None), at)
    for first, last in itertools.pairwise(at.tolist()):
        alone = run(slice(first, last), starts([last - first]))
        assert all(torch.equal(x, y[first:last]) for x, y in zip(alone, whole))

    slots = torch.randperm(len(key), generator=torch.Generator().manual_seed(1)).int()
    cache = [torch.empty_like(x).index_copy_(0, slots.long(), x) for x in (key, value)]
    for token in range(max(lengths)):  # of every sequence that has so many
        running = [s for s, length in enumerate(lengths) if token < length]
        now = torch.stack([query[at[s] + token] for s in running])
        pages = torch.cat([slots[at[s] : at[s] + token + 1] for s in running])
        one_each = starts([1] * len(running)), starts([token + 1] * len(running))
        decoded = compiled.attention(now, *cache, *one_each, 0.2, pages)
        assert torch.equal(decoded, torch.stack([whole[0][at[s] + token] for s in running]))


@needs_build
def test_what_it_takes() -> None:
    cpu = torch.device("cpu")
    assert compiled.takes(torch.float32, cpu, 24)
    assert not compiled.takes(torch.float32, cpu, 20)
    assert not compiled.takes(torch.bfloat16, cpu, 24)
    assert not compiled.takes(torch.float32, torch.device("cuda"), 24)
    with kernels(False):
        assert not compiled.takes(torch.float32, cpu, 24)
