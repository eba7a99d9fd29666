"""The top-k tokens of every position over the whole vocabulary, and log-probs of several given tokens.

Shape suffixes: S scored positions, R those of a chunk, H hidden size, V token ids of this rank, K tokens of each
position.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from miles_spmd.training.log_probs import Distribution, scan
from miles_spmd.training.output_layer import OutputLayer


@torch.no_grad()
def top_candidates(hidden: Tensor, layer: OutputLayer, k: int, distribution: Distribution) -> tuple[Tensor, Tensor]:
    """Return the top-``k`` tokens of every row: global ids (int32 [S, k]) and log-probs (fp32 [S, k]), descending.

    Of equally likely tokens the one with the lower id comes first. ``hidden`` [S, H]; no gradient. Raises ValueError
    for a ``k`` that is larger than the vocabulary or not positive, and for a distribution that is cut.
    """
    _require_uncut(distribution)
    if not 0 < k <= layer.vocab_size:
        raise ValueError(f"{k} candidates of a vocabulary of {layer.vocab_size} tokens")
    width = min(k, len(layer.weight))  # the same on all ranks, some of which may have fewer tokens
    keys_SK = torch.full((len(hidden), width), torch.iinfo(torch.int64).min, device=hidden.device)

    def keep_best(chunk: slice, logits_RV: Tensor) -> None:
        best = _keys(logits_RV, layer.first_id).topk(min(width, logits_RV.shape[1])).values
        keys_SK[chunk, : best.shape[1]] = best

    rows = scan(layer, hidden, hidden.new_empty((len(hidden), 0), dtype=torch.int64), distribution, keep_best)
    if layer.group is not None:
        of_ranks = [torch.empty_like(keys_SK) for _ in range(layer.group.size())]
        dist.all_gather(of_ranks, keys_SK, layer.group)
        keys_SK = torch.cat(of_ranks, 1).topk(k).values
    ids_SK, logits_SK = _from_keys(keys_SK)
    return ids_SK, rows.log_probs(logits_SK)


@torch.no_grad()
def log_probs_of(hidden: Tensor, layer: OutputLayer, ids: Tensor, distribution: Distribution) -> Tensor:
    """Return the log-probs of several tokens of every row, fp32 [S, K].

    ``ids``: global ids, int32 or int64 [S, K]; ``hidden`` [S, H]; no gradient. Raises ValueError for a distribution
    that is cut.
    """
    _require_uncut(distribution)
    rows = scan(layer, hidden, ids.long(), distribution)
    return rows.log_probs(rows.chosen_SK)


def _require_uncut(distribution: Distribution) -> None:
    if distribution.is_cut:
        raise ValueError(f"candidates are compared over the whole vocabulary, not under {distribution}")


# A key packs a logit and its token id into one int64, so that one topk orders by logit and, among equal logits, by id
# in descending order of keys: the upper half is the logit as an integer of the same order, the lower half 2^32 - 1 -
# id.
_LOW_BITS = 0xFFFFFFFF


def _keys(logits_RV: Tensor, first_id: int) -> Tensor:
    bits_RV = (logits_RV.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0: they are equal
    ids_V = torch.arange(first_id, first_id + logits_RV.shape[1], device=logits_RV.device)
    return _ordered(bits_RV).long().bitwise_left_shift_(32).add_(_LOW_BITS - ids_V)


def _from_keys(keys_SK: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids (int32) and logits (fp32)."""
    ids_SK = _LOW_BITS - (keys_SK & _LOW_BITS)
    return ids_SK.int(), _ordered((keys_SK >> 32).int()).view(torch.float32)


def _ordered(bits: Tensor) -> Tensor:
    """Map the bits of fp32 numbers, int32, to integers of the same order, or back.

    Bits of positive numbers are in order already; those of negative ones are in reverse, except for the sign.
    """
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
