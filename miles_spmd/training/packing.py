"""From a micro-batch of sequences to this rank's packed stream of tokens, and from its results back to sequences.

The logits at position t - 1 score token t. Everything that belongs to a token is therefore placed at the position
before it, and only positions whose token has a loss weight are scored at all: the others (prompts, padding) cost no
vocabulary-sized work.

Three numberings occur: ``flat`` counts all tokens of all sequences of the micro-batch, end to end; ``stream`` adds the
padding between and behind them; a rank's own positions count the part of the stream that it holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from miles_spmd.training.attention import PackedSequences, make_blocks
from miles_spmd.training.parallel import Coordinates
from miles_spmd.types.token_batch import TokenBatch
from miles_spmd.types.train_sequence import MicroBatch, TrainSequence

# per-token arrays that a sequence may have and a loss may read: the fields that both types have
_OPTIONAL_FIELDS = tuple(
    field.name
    for field in fields(TokenBatch)
    if field.name in TrainSequence.__struct_fields__ and field.name != "loss_weights"
)


@dataclass
class PackedBatch:
    """This rank's part of one micro-batch: T tokens of its stream, S of them scored, on the rank's device.

    At least one position is scored, so that every rank executes the output layer. Where no token is scored, a dummy
    position with weight 0 is.
    """

    tokens: Tensor  # int64 [1, T]
    sequences: PackedSequences
    targets: Tensor  # int64 [S], the token that each scored position predicts
    candidates: Tensor | None  # int64 [S, K], other tokens whose log-probs are computed
    batch: TokenBatch  # [S]
    sources: np.ndarray  # int64 [S], the flat index of each scored token; -1: a stand-in's
    lengths: list[int]  # of the sequences


class PackedSegmentSum:
    """The :class:`~miles_spmd.types.token_batch.SegmentSum` of a packed micro-batch.

    ``segment`` int64 [S] is the number of each scored token's segment within the micro-batch, which has ``count`` of
    them; ``group`` joins the context-parallel ranks that share the segments.
    """

    def __init__(self, segment: Tensor, count: int, group: dist.ProcessGroup | None) -> None:
        self.segment, self.count, self.group = segment, count, group

    def __call__(self, values: Tensor) -> Tensor:
        return _SegmentSum.apply(values, self)

    def total(self, values: Tensor) -> Tensor:
        """Return for each token the sum of its segment's ``values``, [S], without a gradient."""
        totals = values.new_zeros(self.count).index_add_(0, self.segment, values)
        if self.group is not None:
            dist.all_reduce(totals, group=self.group)
        return totals[self.segment]


class _SegmentSum(torch.autograd.Function):
    """Multiplication by a symmetric matrix: the backward pass is the same operation."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sums: PackedSegmentSum) -> Tensor:
        ctx.sums = sums
        return sums.total(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.sums.total(gradient), None


def stream_length(micro_batch: MicroBatch, where: Coordinates, sequence_parallel: bool, multiple: int = 1) -> int:
    """Return the tokens of the packed stream over all context-parallel ranks, padding included.

    The number of tokens that each rank's linears are given is a multiple of ``multiple``.
    """
    total = sum(_padded(len(sequence.tokens), where.cp_size) for sequence in micro_batch)
    unit = math.lcm(_granule(where.cp_size), where.cp_size * multiple * (where.tp_size if sequence_parallel else 1))
    return -(-total // unit) * unit


def pack(micro_batch: MicroBatch, where: Coordinates, device: torch.device, length: int) -> PackedBatch:
    """Lay the sequences end to end in a stream of ``length`` tokens and return this context-parallel rank's part.

    Sequences are padded at their end to a length that the zigzag can cut; what remains of ``length`` becomes sequences
    of padding, because attention requires every token to be in a sequence. Raises ValueError for an array that does
    not fit its sequence, and for a pair that is not whole.
    """
    if not micro_batch:
        raise ValueError("a micro-batch has no sequence; send one without loss weights")
    for index, sequence in enumerate(micro_batch):
        _check(index, sequence)
    in_pairs = micro_batch[0].pair_signs is not None
    if in_pairs and len(micro_batch) % 2:
        raise ValueError(f"a micro-batch of pairs has {len(micro_batch)} sequences; each pair's two must be in one")
    lengths = np.asarray([len(sequence.tokens) for sequence in micro_batch])
    padded = np.asarray([_padded(n, where.cp_size) for n in lengths])
    padding = _padding_sequences(length - int(padded.sum()), int(padded.max()))
    whole = np.concatenate([padded, padding])  # lengths of the stream's sequences
    within = np.arange(length) - np.repeat(np.cumsum(whole) - whole, whole)  # each position's place in its sequence
    is_token = within < np.repeat(np.concatenate([lengths, np.zeros_like(padding)]), whole)  # and no padding
    own = _zigzag(within, np.repeat(whole, whole), where.cp_rank, where.cp_size)

    flat_tokens = np.concatenate([sequence.tokens for sequence in micro_batch])
    tokens = np.zeros(length, np.int64)
    tokens[is_token] = flat_tokens
    source = _sources(micro_batch, within, is_token)[own]
    scored = np.flatnonzero(source >= 0)
    if not len(scored):
        scored = np.zeros(1, np.int64)  # the stand-in, whose source is -1
    sources = source[scored]

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)

    def per_token(name: str) -> Tensor | None:
        flat = _flat(micro_batch, name)
        return None if flat is None else tensor(np.where(sources < 0, 0, flat[sources]).astype(np.float32))

    def sums(sequences: int) -> PackedSegmentSum:
        """Of segments of so many sequences."""
        return PackedSegmentSum(tensor(sequence_of[sources] // sequences), len(lengths), where.cp_group)

    candidates = _flat(micro_batch, "candidates")
    sequence_of = np.repeat(np.arange(len(lengths)), lengths)
    longest = int(whole.max())
    starts = tensor(np.concatenate([[0], np.cumsum(whole)]).astype(np.int32))
    return PackedBatch(
        tokens=tensor(tokens[own])[None],
        sequences=PackedSequences(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            blocks=make_blocks(whole, where.cp_rank, where.cp_size, device),
            scored=tensor(scored),
            positions=tensor(within[own]),
        ),
        targets=tensor(flat_tokens[sources].astype(np.int64)),
        candidates=None if candidates is None else tensor(candidates[sources].astype(np.int64)),
        batch=TokenBatch(
            loss_weights=per_token("loss_weights"),  # type: ignore[arg-type]
            sequence_sum=sums(1),
            # a pair's two sequences follow each other, so sequences 2 i and 2 i + 1 are pair i
            pair_sum=sums(2) if in_pairs else None,
            **{name: per_token(name) for name in _OPTIONAL_FIELDS},  # type: ignore[arg-type]
        ),
        sources=sources,
        lengths=lengths.tolist(),
    )


def scatter(batches: Sequence[PackedBatch], values: Sequence[Tensor]) -> np.ndarray:
    """Put results [S, ...] of every micro-batch at their tokens: [all tokens of all sequences, ...].

    Tokens that this rank does not score have 0.
    """
    flat = []
    for batch, value in zip(batches, values, strict=True):
        real = batch.sources >= 0
        scored = value.detach().cpu().numpy()
        out = np.zeros((sum(batch.lengths), *scored.shape[1:]), scored.dtype)
        out[batch.sources[real]] = scored[real]
        flat.append(out)
    return np.concatenate(flat)


def split(batches: Sequence[PackedBatch], flat: np.ndarray) -> list[np.ndarray]:
    """Cut what :func:`scatter` returns into one array per sequence, in batch order."""
    return np.split(flat, np.cumsum([n for batch in batches for n in batch.lengths])[:-1])


def _sources(micro_batch: MicroBatch, within: np.ndarray, is_token: np.ndarray) -> np.ndarray:
    """Return for each position of the stream the flat index of the token that it scores, int64; -1: none.

    A sequence's first token has no position before it, so it is never scored, whatever its weight.
    """
    stream = np.flatnonzero(is_token)  # position of each flat token
    weighted = np.concatenate([sequence.loss_weights for sequence in micro_batch]) != 0
    weighted &= within[stream] > 0
    source = np.full(len(within), -1)
    source[stream[weighted] - 1] = np.flatnonzero(weighted)
    return source


def _flat(micro_batch: MicroBatch, name: str) -> np.ndarray | None:
    """Return the arrays of all sequences end to end; None if they have none."""
    arrays = [getattr(sequence, name) for sequence in micro_batch]
    return None if all(array is None for array in arrays) else np.concatenate(arrays)


def _granule(cp_size: int) -> int:
    """Return what a sequence's length must be a multiple of: two equal chunks for every context-parallel rank."""
    return 2 * cp_size if cp_size > 1 else 1


def _padded(length: int, cp_size: int) -> int:
    return -(-length // _granule(cp_size)) * _granule(cp_size)


def _padding_sequences(tokens: int, longest: int) -> np.ndarray:
    """Return lengths of sequences of padding, none longer than the batch's longest: one long sequence would cost
    attention more than all others together."""
    full, rest = divmod(tokens, longest)
    return np.asarray([longest] * full + [rest] * bool(rest), np.int64)


def _zigzag(within: np.ndarray, sizes: np.ndarray, rank: int, size: int) -> np.ndarray:
    """Return the positions of the stream that context-parallel ``rank`` holds, in order: of every sequence one chunk
    counted from its start and one from its end, so that all ranks have the same work under a causal mask."""
    if size == 1:
        return np.arange(len(within))
    chunk = within // (sizes // (2 * size))
    return np.flatnonzero((chunk == rank) | (chunk == 2 * size - 1 - rank))


def _check(index: int, sequence: TrainSequence) -> None:
    expected = (len(sequence.tokens),)
    if not expected[0]:
        raise ValueError(f"sequence {index} of the micro-batch has no tokens")
    for name in ("loss_weights", "candidates", *_OPTIONAL_FIELDS):
        array = getattr(sequence, name)
        if array is not None and array.shape[:1] != expected:
            raise ValueError(
                f"sequence {index} of the micro-batch: {name} has shape {array.shape}, its tokens have {expected}"
            )
