"""Streams, their parts on context-parallel ranks, and attention over them, against one sequence at a time."""

from __future__ import annotations

import itertools
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miles_spmd.invariant.attention import PaddedAttention
from miles_spmd.models.attention import PLAIN, Form
from miles_spmd.training.attention import make_blocks
from miles_spmd.training.packing import pack, scatter, split, stream_length
from miles_spmd.training.parallel import Coordinates
from tests.invariant import attention_oracle
from tests.invariant.both_ways import both_ways, kernels
from tests.training.cases import sequences

CPU = torch.device("cpu")
ALONE = Coordinates(0, 1, 0, 1, None, 0, 1, 0, 1, 0, 1, 0, 1, waits_with=0)
lengths_of_a_batch = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    lengths_of_a_batch,
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.integers(0, 50),
    st.sampled_from([1, 128]),
)
def test_every_trained_token_is_scored_once(
    lengths: list[int], cp_size: int, tp_size: int, extra: int, multiple: int
) -> None:
    """Over the ranks of a context-parallel group: by the position before it, with its own target, weight and values."""
    batch = sequences(lengths)
    everything = Coordinates(0, tp_size, 0, cp_size, None, 0, 1, 0, 1, 0, 1, 0, 1, waits_with=0)
    granule = 2 * cp_size * tp_size
    length = stream_length(batch, everything, sequence_parallel=tp_size > 1, multiple=multiple)
    assert length % (cp_size * tp_size * multiple) == 0
    length += granule * extra
    parts = [pack(batch, replace(everything, cp_rank=rank), CPU, length) for rank in range(cp_size)]

    names = ("tokens", "loss_weights", "advantages")
    flat = {name: np.concatenate([getattr(s, name) for s in batch]) for name in names}
    within = np.concatenate([np.arange(n) for n in lengths])
    trained = (flat["loss_weights"] != 0) & (within > 0)
    seen = np.zeros(len(within), int)
    for part in parts:
        assert part.tokens.shape == (1, length // cp_size)
        assert len(part.sequences.scored) == len(part.sources) >= 1
        for s, source in enumerate(part.sources):
            if source < 0:
                assert part.batch.loss_weights[s] == 0
                continue
            seen[source] += 1
            position = part.sequences.scored[s]
            assert part.sequences.positions[position] == within[source] - 1
            assert part.tokens[0, position] == flat["tokens"][source - 1]
            assert part.targets[s] == flat["tokens"][source]
            assert part.batch.loss_weights[s] == flat["loss_weights"][source]
            assert part.batch.advantages[s] == flat["advantages"][source]
    np.testing.assert_array_equal(seen, trained)

    back = sum(scatter([part], [part.batch.advantages]) for part in parts)
    for sequence, values in zip(batch, split(parts[:1], back), strict=True):
        expected = np.where(sequence.loss_weights != 0, sequence.advantages, 0)
        expected[0] = 0
        np.testing.assert_array_equal(values, expected)


def test_arrays_must_fit_their_sequence() -> None:
    good = sequences([4])[0]
    bad = msgspec.structs.replace(good, advantages=good.advantages[:3])
    with pytest.raises(ValueError, match=r"sequence 1 of the micro-batch: advantages has shape \(3,\)"):
        pack([good, bad], ALONE, CPU, 8)
    with pytest.raises(ValueError, match="a micro-batch has no sequence"):
        pack([], ALONE, CPU, 8)
    empty = msgspec.structs.replace(good, tokens=good.tokens[:0])
    with pytest.raises(ValueError, match="sequence 0 of the micro-batch has no tokens"):
        pack([empty], ALONE, CPU, 8)


@both_ways
@settings(max_examples=25, deadline=None)
@given(lengths_of_a_batch, st.sampled_from([1, 2, 4]), st.sampled_from([PLAIN, Form(1), Form(7), Form(20, 2.0)]))
def test_attention(with_kernels: bool, lengths: list[int], cp_size: int, form: Form) -> None:
    """Values and gradients of each context-parallel rank's queries over all ranks' keys: its blocks have keys before
    their queries, and windows that begin anywhere."""
    whole = [-(-n // (2 * cp_size)) * 2 * cp_size for n in lengths]
    generator = torch.Generator().manual_seed(sum(lengths))
    q, k, v, g = (torch.randn(sum(whole), heads, 8, generator=generator) for heads in (4, 2, 2, 4))
    for x in (q, k, v):
        x.requires_grad_()
    starts = [0, *itertools.accumulate(whole)]
    layer = 0.3, form, torch.randn(4, generator=generator)
    parts = [[x[a:b] for x in (q, k, v)] for a, b in itertools.pairwise(starts)]
    expected = torch.cat([attention_oracle.attention(*part, *layer)[0] for part in parts])
    gradients = torch.autograd.grad((expected * g).sum(), (q, k, v))

    mine = [zigzag(starts, rank, cp_size) for rank in range(cp_size)]
    gathered = torch.cat(mine)  # ranks' streams put end to end, as the all-gather does
    total = torch.zeros(())
    for rank in range(cp_size):
        blocks = make_blocks(whole, rank, cp_size, CPU)
        keys, values = (x[gathered] for x in (k, v))
        if blocks.key_index is not None:
            keys, values = keys[blocks.key_index], values[blocks.key_index]
        with kernels(with_kernels):
            actual = blocks.attend(q[mine[rank]], keys, values, *layer)
        assert isinstance(blocks.kernel, PaddedAttention) != with_kernels
        torch.testing.assert_close(actual.double(), expected[mine[rank]], rtol=1e-5, atol=1e-5)
        total = total + (actual * g[mine[rank]]).sum()
    for ours, theirs in zip(torch.autograd.grad(total, (q, k, v)), gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def zigzag(starts: list[int], rank: int, size: int) -> Tensor:
    """Return the positions of the stream on one rank: chunk ``rank`` from the front and from the back of each
    sequence."""
    if size == 1:
        return torch.arange(starts[-1])
    chunks = [torch.arange(a, b).chunk(2 * size) for a, b in itertools.pairwise(starts)]
    return torch.cat([c for chunk in chunks for c in (chunk[rank], chunk[2 * size - 1 - rank])])
