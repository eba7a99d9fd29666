"""Attention over packed sequences, by the compiled kernel and in tensor operations, against torch in float64; with keys
in their places and in pages. Rows do not depend on each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from miles_spmd.invariant import attention, compiled
from miles_spmd.invariant.attention import PaddedAttention, packed_attention
from tests.invariant.both_ways import kernels, needs_build

HEADS = [(1, 1), (4, 4), (4, 2), (6, 2), (3, 1), (8, 1)]  # of queries, of keys


@pytest.fixture(params=[pytest.param("compiled", marks=needs_build), "torch", "torch, cut"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``cut``: with the smallest batches and tiles, into which long sequences are cut."""
    torch.manual_seed(0)
    if request.param == "torch, cut":
        monkeypatch.setattr(attention, "MOST", 1)
    with kernels(request.param == "compiled"):
        one = torch.empty(0, 1, 8)
        assert isinstance(packed_attention([1], [1], one, one), PaddedAttention) == (request.param != "compiled")
        yield


def reference(
    query_lengths: list[int],
    key_lengths: list[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    slots: Tensor | None = None,
) -> Tensor:
    """Return what :func:`packed_attention` computes, in float64 and one sequence at a time."""
    query, key, value = (x.double() for x in (query, key, value))
    if slots is not None:
        key, value = key[slots.long()], value[slots.long()]
    share = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(share, 1) for x in (key, value))
    outputs = []
    for q, k, v in zip(query.split(query_lengths), key.split(key_lengths), value.split(key_lengths)):
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        seen = torch.ones(scores.shape[1:]).tril(len(k) - len(q)).bool()
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    # new tokens, and keys before them: a context-parallel rank's blocks and an engine's prefixes have some
    st.lists(st.tuples(st.integers(1, 70), st.sampled_from([0, 0, 1, 40, 130])), min_size=1, max_size=5),
    st.sampled_from(HEADS),
    st.sampled_from([8, 16, 24, 64, 128]),
)
def test_values_and_gradients(lengths: list[tuple[int, int]], heads: tuple[int, int], dim: int) -> None:
    both = [new for new, _ in lengths], [new + before for new, before in lengths]
    shapes = [(sum(both[i]), heads[i], dim) for i in (0, 1, 1)]
    torch.manual_seed(0)  # an example that fails has to fail again
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    gradient = torch.randn(shapes[0]).transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
    actual = packed_attention(*both, *inputs[:2])(*inputs, dim**-0.5)
    expected = reference(*both, *inputs, dim**-0.5)
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=0)
    ours, theirs = (torch.autograd.grad(out, inputs, gradient.to(out.dtype)) for out in (actual, expected))
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
def test_pages(heads: tuple[int, int]) -> None:
    """Keys anywhere in a cache, whose other slots must not be read: they are NaN."""
    both = [3, 1, 70, 1], [3, 90, 129, 33]
    query = torch.randn(75, heads[0], 16)
    slots = torch.randperm(400)[: sum(both[1])].int()
    key, value = (torch.full((400, heads[1], 16), torch.nan) for _ in range(2))
    key[slots.long()], value[slots.long()] = torch.randn(2, len(slots), heads[1], 16)
    actual = packed_attention(*both, query, key, slots)(query, key, value, 0.3)
    torch.testing.assert_close(actual.double(), reference(*both, query, key, value, 0.3, slots), atol=2e-6, rtol=0)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dim", [8, 64])
def test_rows_are_bitwise_equal_in_any_batch(heads: tuple[int, int], dim: int) -> None:
    """A sequence alone, among others, and one token at a time over a cache."""
    lengths = [37, 150, 1, 20]
    ends = [*itertools.accumulate(lengths)]
    query = torch.randn(ends[-1], heads[0], dim)
    key, value = torch.randn(2, ends[-1], heads[1], dim)

    whole = packed_attention(lengths, lengths, query, key)(query, key, value, 0.2)
    for end, length in zip(ends, lengths):
        alone = [x[end - length : end] for x in (query, key, value)]
        assert torch.equal(packed_attention([length], [length], *alone[:2])(*alone, 0.2), whole[end - length : end])

    slots = torch.randperm(len(key)).int()
    cache = [torch.empty_like(x).index_copy_(0, slots.long(), x) for x in (key, value)]
    for token in range(max(lengths)):  # of every sequence that has so many
        starts = [end - length for end, length in zip(ends, lengths) if token < length]
        now = torch.stack([query[start + token] for start in starts])
        pages = torch.cat([slots[start : start + token + 1] for start in starts])
        decode = packed_attention([1] * len(starts), [token + 1] * len(starts), now, cache[0], pages)
        assert torch.equal(decode(now, *cache, 0.2), torch.stack([whole[start + token] for start in starts]))


@needs_build
def test_gradients_do_not_depend_on_other_sequences() -> None:
    """Of the kernel: those of a padded batch are sums over as many rows as it is padded to."""
    lengths = [37, 150, 20]
    stream = [torch.randn(sum(lengths), heads, 16) for heads in (4, 2, 2, 4)]

    def gradients(lengths: list[int], *stream: Tensor) -> tuple[Tensor, ...]:
        inputs = [x.clone().requires_grad_() for x in stream[:3]]
        with kernels(True):
            out = packed_attention(lengths, lengths, *inputs[:2])(*inputs, 0.2)
        return torch.autograd.grad(out, inputs, stream[3])

    whole = [x.split(lengths) for x in gradients(lengths, *stream)]
    for s, length in enumerate(lengths):
        alone = gradients([length], *(x.split(lengths)[s] for x in stream))
        assert all(torch.equal(x, y[s]) for x, y in zip(alone, whole))


def test_what_the_kernel_supports(request: pytest.FixtureRequest) -> None:
    built, cpu = request.node.callspec.params["implementation"] == "compiled", torch.device("cpu")
    assert compiled.takes(torch.float32, cpu, 24) == built
    assert not compiled.takes(torch.float32, cpu, 20)
    assert not compiled.takes(torch.bfloat16, cpu, 24)
    assert not compiled.takes(torch.float32, torch.device("cuda"), 24)
