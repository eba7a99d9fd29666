"""From a micro-batch of sequences to this rank's packed stream of tokens, and from its results back to sequences.

Token t is scored by the logits at position t - 1. Everything that belongs to a token is therefore laid one position
early into the stream, and only positions whose token has a loss weight are scored at all: the rest (prompts, padding)
costs no vocabulary-sized work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miles_spmd.training.attention import PackedSequences, make_blocks
from miles_spmd.training.parallel import Coordinates
from miles_spmd.training.segments import SequenceSum
from miles_spmd.types.token_batch import TokenBatch
from miles_spmd.types.train_sequence import MicroBatch, TrainSequence

_OPTIONAL_FIELDS = (
    "advantages",
    "rollout_log_probs",
    "old_log_probs",
    "ref_log_probs",
    "policy_weights",
    "returns",
    "old_values",
    "pair_signs",
)


@dataclass
class PackedBatch:
    """This rank's part of one micro-batch. T tokens of its stream, S of them scored, on the rank's device.

    At least one position is scored, so that every rank has logits to run; a stand-in has weight 0.
    """

    tokens: Tensor  # int64 [1, T]
    positions: Tensor  # int64 [T], of each token within its sequence
    sequences: PackedSequences
    targets: Tensor  # int64 [S], the token that each scored position predicts
    candidates: Tensor | None  # int64 [S, K], others to give the log-probs of
    batch: TokenBatch  # [S]
    sources: np.ndarray  # int64 [S], where each scored token lies among all tokens of the micro-batch; -1: nowhere
    lengths: list[int]  # of the sequences


def stream_length(micro_batch: MicroBatch, where: Coordinates, sequence_parallel: bool, multiple: int = 1) -> int:
    """Tokens of the packed stream over all context-parallel ranks, padding included. What each rank's linears see of
    it is a multiple of ``multiple`` tokens."""
    total = sum(_padded(len(sequence.tokens), where.cp_size) for sequence in micro_batch)
    unit = math.lcm(_granule(where.cp_size), where.cp_size * multiple * (where.tp_size if sequence_parallel else 1))
    return -(-total // unit) * unit


def pack(micro_batch: MicroBatch, where: Coordinates, device: torch.device, length: int) -> PackedBatch:
    """Lay the sequences end to end in a stream of ``length`` tokens and take this context-parallel rank's part.

    Sequences are padded at their end to what zigzag needs; what ``length`` leaves over becomes sequences of padding,
    because attention wants every token to be in one. Raises ValueError for an array that does not fit its sequence.
    """
    if not micro_batch:
        raise ValueError("a micro-batch has no sequence; send one without loss weights")
    for index, sequence in enumerate(micro_batch):
        _check(index, sequence)
    lengths = np.asarray([len(sequence.tokens) for sequence in micro_batch])
    padded = np.asarray([_padded(n, where.cp_size) for n in lengths])
    whole = np.concatenate([padded, _padding_sequences(length - int(padded.sum()), int(padded.max()))])
    within = np.arange(length) - np.repeat(np.cumsum(whole) - whole, whole)
    mine = _zigzag(within, np.repeat(whole, whole), where.cp_rank, where.cp_size)

    # places of all tokens of all sequences in the stream, and of the position that scores each
    tokens_of = np.concatenate([lengths, np.zeros(len(whole) - len(lengths), np.int64)])
    real = np.flatnonzero(within < np.repeat(tokens_of, whole))
    tokens = np.zeros(length, np.int64)
    tokens[real] = np.concatenate([sequence.tokens for sequence in micro_batch])
    source = np.full(length, -1)
    weighted = np.concatenate([sequence.loss_weights for sequence in micro_batch]) != 0
    weighted &= within[real] > 0
    source[real[weighted] - 1] = np.flatnonzero(weighted)

    source = source[mine]
    scored = np.flatnonzero(source >= 0)
    if not len(scored):
        scored = np.zeros(1, np.int64)
    sources = source[scored]

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)

    def per_token(name: str) -> Tensor | None:
        flat = _flat(micro_batch, name)
        return None if flat is None else tensor(np.where(sources < 0, 0, flat[sources]).astype(np.float32))

    flat_tokens = np.concatenate([sequence.tokens for sequence in micro_batch])
    candidates = _flat(micro_batch, "candidates")
    sequence_of = np.repeat(np.arange(len(lengths)), lengths)
    in_pairs = micro_batch[0].pair_signs is not None
    if in_pairs and len(micro_batch) % 2:
        raise ValueError(f"a micro-batch of pairs has {len(micro_batch)} sequences; each pair's two must be in one")
    longest = int(whole.max())
    starts = tensor(np.concatenate([[0], np.cumsum(whole)]).astype(np.int32))
    return PackedBatch(
        tokens=tensor(tokens[mine])[None],
        positions=tensor(within[mine]),
        sequences=PackedSequences(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            blocks=make_blocks(whole, where.cp_rank, where.cp_size, device),
            scored=tensor(scored),
            positions=tensor(within[mine]),
        ),
        targets=tensor(flat_tokens[sources].astype(np.int64)),
        candidates=None if candidates is None else tensor(candidates[sources].astype(np.int64)),
        batch=TokenBatch(
            loss_weights=per_token("loss_weights"),  # type: ignore[arg-type]
            sequence_sum=SequenceSum(tensor(sequence_of[sources]), len(lengths), where.cp_group),
            pair_sum=SequenceSum(tensor(sequence_of[sources] // 2), len(lengths), where.cp_group) if in_pairs else None,
            **{name: per_token(name) for name in _OPTIONAL_FIELDS},  # type: ignore[arg-type]
        ),
        sources=sources,
        lengths=lengths.tolist(),
    )


def scatter(batches: Sequence[PackedBatch], values: Sequence[Tensor]) -> np.ndarray:
    """Results [S, ...] of all micro-batches, [all tokens of all sequences, ...]; 0 where this rank scored nothing."""
    flat = []
    for batch, value in zip(batches, values, strict=True):
        real = batch.sources >= 0
        of_tokens = value.detach().cpu().numpy()
        out = np.zeros((sum(batch.lengths), *of_tokens.shape[1:]), of_tokens.dtype)
        out[batch.sources[real]] = of_tokens[real]
        flat.append(out)
    return np.concatenate(flat)


def split(batches: Sequence[PackedBatch], flat: np.ndarray) -> list[np.ndarray]:
    """The inverse of concatenation: one array per sequence, in batch order."""
    return np.split(flat, np.cumsum([n for batch in batches for n in batch.lengths])[:-1])


def _flat(micro_batch: MicroBatch, name: str) -> np.ndarray | None:
    """The arrays of all sequences end to end; None if they have none."""
    arrays = [getattr(sequence, name) for sequence in micro_batch]
    return None if all(array is None for array in arrays) else np.concatenate(arrays)


def _granule(cp_size: int) -> int:
    return 2 * cp_size if cp_size > 1 else 1


def _padded(length: int, cp_size: int) -> int:
    return -(-length // _granule(cp_size)) * _granule(cp_size)


def _padding_sequences(tokens: int, longest: int) -> np.ndarray:
    """Sequences of padding no longer than the batch's longest, so that they do not dominate attention."""
    full, rest = divmod(tokens, longest)
    return np.asarray([longest] * full + [rest] * bool(rest), np.int64)


def _zigzag(within: np.ndarray, sizes: np.ndarray, rank: int, size: int) -> np.ndarray:
    """Positions of the stream that context-parallel ``rank`` holds, in order."""
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
