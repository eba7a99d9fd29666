"""Log-probs, entropy and likeliest tokens from hidden states, without ever holding all logits.

The vocabulary is split over the ranks of a tensor-parallel group. Rows are taken in chunks: their logits are made,
reduced to a few numbers per row, and made again for the gradient. 16k positions of a vocabulary of 152k would take
9 GiB for every copy otherwise; what it costs is one matrix product more.

Shape suffixes: S scored positions, R those of a chunk, H hidden size, V this rank's slice of the vocabulary, K tokens
of each position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from miles_spmd.algorithms.truncation import threshold
from miles_spmd.invariant.linear import linear
from miles_spmd.training import softmax

# Logits of a chunk on a rank, in tensor operations: 512 MiB in fp32, of which two are alive beside those that came in,
# three while the entropy is differentiated. Where a kernel reads them as they come, the same memory holds more of them.
MAX_LOGITS = 2**27
FP32_COPIES = 2 * 4  # bytes for each logit
ROWS = 128  # products of a multiple of so many rows waste nothing
SORTING = 4  # rows that are sorted take so many times more: values, indices and running sums
OUT = -1e4  # has a probability of 0, like -inf, but a product of the two is not NaN


@dataclass(frozen=True)
class Distribution:
    """What log-probs are of: softmax(logits / temperature), cut by top-k and top-p as the rollout cut it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1

    @property
    def is_cut(self) -> bool:
        return self.top_p < 1 or self.top_k > 0


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    distribution: Distribution,
    *,
    first_id: int = 0,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    differentiate_entropy: bool = False,
    invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """log p(target) and -sum p log p of ``distribution`` over logits ``hidden @ weight.T``; fp32 [S], natural log.

    ``weight`` [V, H] makes the logits of token ids ``first_id`` .. ``first_id + V - 1``; ids from ``vocab_size`` on are
    padding and no tokens. The other ranks of ``group`` hold the rest of the vocabulary and call this with the same
    ``hidden`` [S, H] and ``targets`` (global ids, int64 [S]). Logits are rounded to the dtype of ``hidden`` and
    ``weight``, as an engine rounds them; float64 gives float64 results.

    Where the distribution is cut, the tokens that are kept are those of these logits, and the target with them: an
    engine that drew it from older weights, or rounded otherwise, must not make it infinitely unlikely. The gradient
    takes the set as given.

    Gradients have the dtypes of ``hidden`` and ``weight``; that of ``weight`` is summed over chunks in fp32, that of
    ``hidden`` is the whole one, on every rank alike. The entropy has a gradient only with ``differentiate_entropy``.
    Collectives: two all-reduces of numbers per row, and one of the gradient of ``hidden``; where the distribution is
    cut, also an all-reduce and a gather of every chunk's logits.

    ``invariant``: log-probs are, to the bit, those of an engine that computes with :mod:`miles_spmd.invariant`. Every
    rank then sums over the whole vocabulary, whose logits it gathers.
    """
    shard = first_id, vocab_size, group, invariant
    return _LinearLogProbs.apply(hidden, weight, targets, distribution, shard, differentiate_entropy)


@torch.no_grad()
def top_candidates(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    distribution: Distribution,
    *,
    first_id: int = 0,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` likeliest tokens of every row: global ids (int32 [S, k]) and log-probs (fp32 [S, k]), descending; of
    equally likely ones the lower id first. Arguments as for :func:`linear_log_probs`, no gradient.

    Raises ValueError for a ``k`` that the vocabulary does not have, and for a distribution that is cut.
    """
    _require_whole(distribution)
    if not 0 < k <= vocab_size:
        raise ValueError(f"{k} candidates of a vocabulary of {vocab_size} tokens")
    head = _Head(weight, first_id, vocab_size, group)
    width = min(k, len(weight))  # the same on all ranks, some of which may have fewer tokens
    keys_SK = torch.full((len(hidden), width), torch.iinfo(torch.int64).min, device=hidden.device)

    def keep_best(part: slice, logits_RV: Tensor) -> None:
        best = _keys(logits_RV, first_id).topk(min(width, logits_RV.shape[1])).values
        keys_SK[part, : best.shape[1]] = best

    rows = _scan(head, hidden, hidden.new_empty((len(hidden), 0), dtype=torch.int64), distribution, keep_best)
    if head.group is not None:
        everywhere = [torch.empty_like(keys_SK) for _ in range(head.group.size())]
        dist.all_gather(everywhere, keys_SK, head.group)
        keys_SK = torch.cat(everywhere, 1).topk(k).values
    ids_SK, logits_SK = _from_keys(keys_SK)
    return ids_SK, rows.log_probs(logits_SK)


@torch.no_grad()
def log_probs_of(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    distribution: Distribution,
    *,
    first_id: int = 0,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Log-probs of several tokens of every row, fp32 [S, K]: of ``ids`` (global, int32 or int64 [S, K]). Arguments as
    for :func:`linear_log_probs`, no gradient. Raises ValueError for a distribution that is cut."""
    _require_whole(distribution)
    rows = _scan(_Head(weight, first_id, vocab_size, group), hidden, ids.long(), distribution)
    return rows.log_probs(rows.chosen_SK)


def _require_whole(distribution: Distribution) -> None:
    if distribution.is_cut:
        raise ValueError(f"candidates are compared over the whole vocabulary, not under {distribution}")


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        distribution: Distribution,
        shard: tuple[int, int, dist.ProcessGroup | None, bool],
        differentiate_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = _scan(_Head(weight, *shard), hidden, targets[:, None], distribution)
        log_probs_S, entropy_S = rows.log_probs(rows.chosen_SK).squeeze(1), rows.entropy()
        ctx.save_for_backward(hidden, weight, targets, rows.peak_S1, rows.total_S1, rows.threshold_S1, entropy_S)
        ctx.distribution, ctx.shard, ctx.differentiate_entropy = distribution, shard, differentiate_entropy
        ctx.kept_RV = rows.kept_RV
        if not differentiate_entropy:
            ctx.mark_non_differentiable(entropy_S)
        return log_probs_S, entropy_S

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, targets, peak_S1, total_S1, threshold_S1, entropy_S = ctx.saved_tensors
        head, distribution = _Head(weight, *ctx.shard), ctx.distribution
        parts = head.parts(len(hidden), distribution)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            dtype = weight.dtype if len(parts) == 1 else _at_least_fp32(weight)
            grad_weight = torch.zeros_like(weight, dtype=dtype)
        kept_RV, ctx.kept_RV = ctx.kept_RV, None  # a second backward pass finds none and makes them again

        def gradient_of_logits(part: slice) -> Tensor:
            logits_RV = head.logits(hidden[part]) if kept_RV is None else kept_RV
            column_R1, total_R1 = head.columns(targets[part, None]), total_S1[part]
            grad_R1, of_entropy = grad_log_probs[part, None], None
            if ctx.differentiate_entropy:
                of_entropy = entropy_S[part, None], grad_entropy[part, None]
            if threshold_S1 is None:
                return head.softmax.differentiate(
                    logits_RV, distribution.temperature, peak_S1[part], total_R1, column_R1, grad_R1, of_entropy
                )
            z_RV = softmax.scaled(logits_RV, distribution.temperature).sub_(peak_S1[part])
            _cut(z_RV, threshold_S1[part], column_R1)
            return softmax.differentiate_relative(
                z_RV, distribution.temperature, total_R1, column_R1, grad_R1, of_entropy
            )

        def pass_on(gradient_RV: Tensor, part: slice) -> None:
            if grad_hidden is not None:
                torch.mm(gradient_RV.to(head.weight.dtype), head.weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight[: gradient_RV.shape[1]], gradient_RV, hidden[part])

        for part in parts:
            pass_on(gradient_of_logits(part), part)
        if grad_hidden is not None and head.group is not None:
            dist.all_reduce(grad_hidden, group=head.group)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


class _Head:
    """The part of the output layer that this rank has, without padding."""

    def __init__(
        self,
        weight: Tensor,
        first_id: int,
        vocab_size: int,
        group: dist.ProcessGroup | None,
        invariant: bool = False,
    ) -> None:
        if first_id >= vocab_size:
            raise ValueError(
                f"the rank with tokens from {first_id} on has none of a vocabulary of {vocab_size}; "
                "take a smaller megatron.tensor_model_parallel_size"
            )
        self.weight = weight[: vocab_size - first_id]
        self.padding = len(weight) - len(self.weight)
        self.first_id, self.vocab_size, self.invariant = first_id, vocab_size, invariant
        self.group = group if group is not None and group.size() > 1 else None

    @property
    def softmax(self) -> ModuleType:
        """What reads logits: a kernel, or tensor operations."""
        if self.weight.is_cuda and self.weight.dtype != torch.float64:
            from miles_spmd.training import softmax_kernel

            return softmax_kernel
        return softmax

    def logits(self, hidden_RH: Tensor) -> Tensor:
        return (linear if self.invariant else F.linear)(hidden_RH, self.weight)

    def measure(self, logits_RV: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Over this rank's part of the vocabulary; where products are invariant, over the whole of it."""
        if self.invariant and self.group is not None:
            # As far apart as an engine's rows, which says how many numbers a thread of the kernel reads at a time.
            logits_RV = self.gather(logits_RV)[:, : self.vocab_size].contiguous()
        return self.softmax.measure(logits_RV, temperature)

    def columns(self, ids: Tensor) -> Tensor:
        """Where among this rank's logits the tokens ``ids`` are; outside of them, if they are on another rank."""
        return ids - self.first_id

    def parts(self, rows: int, distribution: Distribution, sorts: bool = False) -> list[slice]:
        """Chunks of rows. Forward and backward pass have the same ones, so that products of the same shape give the
        same logits, and the same tokens are kept."""
        if distribution.is_cut:
            size = MAX_LOGITS // (SORTING * self.vocab_size)
        elif sorts or self.softmax is softmax:
            size = MAX_LOGITS // (len(self.weight) * (SORTING if sorts else 1))
        else:
            item = self.weight.itemsize
            size = MAX_LOGITS * (item + FP32_COPIES) // (item * len(self.weight))
            size -= size % ROWS if size > ROWS else 0
        size = max(1, size)
        return [slice(start, start + size) for start in range(0, rows, size)]

    def gather(self, z_RV: Tensor) -> Tensor:
        """The whole vocabulary's, from all ranks; padding is -inf."""
        if self.group is None:
            return z_RV
        own = F.pad(z_RV, (0, self.padding), value=float("-inf"))
        everywhere = [torch.empty_like(own) for _ in range(self.group.size())]
        dist.all_gather(everywhere, own, self.group)
        return torch.cat(everywhere, 1)


@dataclass
class _Rows:
    """What the first pass over the logits leaves of every row; sums are over exp(z), z = v - peak, v = logit /
    temperature, of what is kept."""

    temperature: float
    peak_S1: Tensor  # of v
    threshold_S1: Tensor | None  # of z, where the distribution is cut
    sums_NS: Tensor  # of exp(z), of z exp(z), and, as the only one of the ranks knows them, the logits of chosen tokens
    kept_RV: Tensor | None = None  # the logits, where they all were one chunk that nothing overwrote

    @property
    def total_S1(self) -> Tensor:
        return self.sums_NS[0, :, None]

    @property
    def chosen_SK(self) -> Tensor:
        return self.sums_NS[2:].T

    def log_probs(self, logits_SK: Tensor) -> Tensor:
        return softmax.scaled(logits_SK.clone(), self.temperature) - self.peak_S1 - self.total_S1.log()

    def entropy(self) -> Tensor:
        return self.sums_NS[0].log() - self.sums_NS[1] / self.sums_NS[0]

    def reduce(self, group: dist.ProcessGroup) -> None:
        """From sums over this rank's tokens, above its own peak, to those of all."""
        own_peak_S1 = self.peak_S1.clone()
        dist.all_reduce(self.peak_S1, dist.ReduceOp.MAX, group)
        shift_S = (own_peak_S1 - self.peak_S1).squeeze(1)
        total_S, weighted_S = self.sums_NS[:2]
        weighted_S += shift_S * total_S
        self.sums_NS[:2] *= shift_S.exp()
        dist.all_reduce(self.sums_NS, dist.ReduceOp.SUM, group)


def _scan(
    head: _Head,
    hidden: Tensor,
    ids_SK: Tensor,
    distribution: Distribution,
    inspect: Callable[[slice, Tensor], None] | None = None,
) -> _Rows:
    """Make all logits once, part by part. ``inspect`` sees them too."""
    rows = _Rows(
        distribution.temperature,
        peak_S1=hidden.new_empty((len(hidden), 1), dtype=_at_least_fp32(hidden)),
        threshold_S1=hidden.new_empty((len(hidden), 1), dtype=_at_least_fp32(hidden)) if distribution.is_cut else None,
        sums_NS=hidden.new_empty((2 + ids_SK.shape[1], len(hidden)), dtype=_at_least_fp32(hidden)),
    )

    def measure(part: slice) -> None:
        logits_RV = head.logits(hidden[part])
        if inspect is not None:
            inspect(part, logits_RV)
        column_RK = head.columns(ids_SK[part])
        rows.sums_NS[2:, part] = softmax.take(logits_RV, column_RK).T
        if rows.threshold_S1 is None:
            measured = head.measure(logits_RV, distribution.temperature)
            rows.peak_S1[part], rows.sums_NS[0, part], rows.sums_NS[1, part] = measured
            if len(logits_RV) == len(hidden) and head.softmax is not softmax:
                rows.kept_RV = logits_RV
            return
        v_RV = softmax.scaled(logits_RV, distribution.temperature)
        peak_R1 = v_RV.amax(-1, keepdim=True)
        if head.group is not None:
            dist.all_reduce(peak_R1, dist.ReduceOp.MAX, head.group)
        z_RV = v_RV.sub_(peak_R1)
        rows.peak_S1[part] = peak_R1
        rows.threshold_S1[part] = threshold(head.gather(z_RV), distribution.top_k, distribution.top_p)
        _cut(z_RV, rows.threshold_S1[part], column_RK)
        rows.sums_NS[0, part], rows.sums_NS[1, part] = softmax.sums(z_RV)

    for part in head.parts(len(hidden), distribution, sorts=inspect is not None):
        measure(part)
    if head.group is not None and not head.invariant:
        rows.reduce(head.group)
    elif head.group is not None:
        dist.all_reduce(rows.sums_NS[2:], group=head.group)
    return rows


def _cut(z_RV: Tensor, threshold_R1: Tensor, column_R1: Tensor) -> None:
    """Take what is below the threshold out of every sum, in place; targets that are here stay in."""
    target_R1, here_R1 = softmax.take(z_RV, column_R1), softmax.is_here(z_RV, column_R1)
    z_RV.masked_fill_(z_RV < threshold_R1, OUT)
    index_R1 = column_R1.clamp(0, z_RV.shape[1] - 1)
    z_RV.scatter_(1, index_R1, torch.where(here_R1, target_R1, z_RV.gather(1, index_R1)))


def _add_product(total_VH: Tensor, gradient_RV: Tensor, hidden_RH: Tensor) -> None:
    """total += gradient^T hidden. A sum in fp32 of 16-bit factors takes products that were not rounded to 16 bits."""
    if total_VH.dtype == hidden_RH.dtype:
        total_VH.addmm_(gradient_RV.to(total_VH.dtype).T, hidden_RH)
    elif not total_VH.is_cuda:
        total_VH.addmm_(gradient_RV.T, hidden_RH.float())
    else:
        factor_VR = gradient_RV.to(hidden_RH.dtype).T
        torch.addmm(total_VH, factor_VR, hidden_RH, out_dtype=total_VH.dtype, out=total_VH)


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# A key of a logit: 64 bits that order as the logits do, and among equal ones as their ids do, downwards. The upper half
# is the fp32 number with the lower bits of negative ones turned over, which makes it order as an integer.


def _keys(logits_RV: Tensor, first_id: int) -> Tensor:
    bits_RV = (logits_RV.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 is no less than 0.0
    ids_V = torch.arange(first_id, first_id + logits_RV.shape[1], device=logits_RV.device)
    return _ordered(bits_RV).long().bitwise_left_shift_(32).add_(_LOW_BITS - ids_V)


def _from_keys(keys_SK: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (int32) and logits (fp32)."""
    ids_SK = _LOW_BITS - (keys_SK & _LOW_BITS)
    return ids_SK.int(), _ordered((keys_SK >> 32).int()).view(torch.float32)


def _ordered(bits: Tensor) -> Tensor:
    """From fp32's bits to integers of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


_LOW_BITS = 0xFFFFFFFF
