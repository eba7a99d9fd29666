"""Log-probs and entropy from hidden states, without ever holding all logits.

Rows are taken in the chunks of :class:`OutputLayer`: their logits are computed, reduced to a few numbers per row, and
computed again for the gradient. The vocabulary may be split over the ranks of a tensor-parallel group.

Shape suffixes: S scored positions, R those of a chunk, H hidden size, V token ids of this rank, K tokens of each
position, N sums of each position. "1" is a dimension of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles_spmd.algorithms.truncation import threshold
from miles_spmd.training import softmax
from miles_spmd.training.output_layer import OutputLayer


@dataclass(frozen=True)
class Distribution:
    """What log-probs are of: softmax(logits / temperature), cut by top-k and top-p as in sampling."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1

    @property
    def is_cut(self) -> bool:
        return self.top_p < 1 or self.top_k > 0


def linear_log_probs(
    hidden: Tensor, layer: OutputLayer, targets: Tensor, distribution: Distribution, differentiate_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Return log p(target) and the entropy -sum p log p of ``distribution`` over ``layer``'s logits, fp32 [S], in nats.

    All ranks that share the vocabulary call this with the same ``hidden`` [S, H] and ``targets`` (global ids, int64
    [S]). Logits are rounded to the dtype of ``hidden`` and the weight, as an engine rounds them; float64 gives float64
    results.

    Where the distribution is cut, the kept tokens are those of these logits, and always the target: it may have been
    sampled from older weights or otherwise rounded logits, and must not become impossible. The gradient takes the set
    of kept tokens as given.

    Gradients have the dtypes of ``hidden`` and the weight; that of the weight is summed over chunks in fp32, that of
    ``hidden`` is the whole one, the same on every rank. The entropy has a gradient only with ``differentiate_entropy``.
    Collectives: two all-reduces of numbers per row, and one of the gradient of ``hidden``; where the distribution is
    cut, also an all-reduce and a gather of every chunk's logits; where the layer is invariant, a gather of every
    chunk's logits in place of the first two.
    """
    return _LinearLogProbs.apply(hidden, layer.weight, targets, layer, distribution, differentiate_entropy)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        layer: OutputLayer,
        distribution: Distribution,
        differentiate_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = scan(layer, hidden, targets[:, None], distribution)
        log_probs_S, entropy_S = rows.log_probs(rows.chosen_SK).squeeze(1), rows.entropy()
        ctx.save_for_backward(hidden, weight, targets, rows.peak_S1, rows.total_S1, rows.threshold_S1, entropy_S)
        ctx.layer, ctx.distribution, ctx.differentiate_entropy = layer, distribution, differentiate_entropy
        ctx.logits_RV = rows.logits_RV
        if not differentiate_entropy:
            ctx.mark_non_differentiable(entropy_S)
        return log_probs_S, entropy_S

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, targets, peak_S1, total_S1, threshold_S1, entropy_S = ctx.saved_tensors
        layer, distribution = ctx.layer, ctx.distribution
        chunks = layer.chunks(len(hidden), distribution.is_cut)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            # a sum over several chunks would be rounded after each of them in 16 bits
            dtype = weight.dtype if len(chunks) == 1 else _at_least_fp32(weight)
            grad_weight = torch.zeros_like(weight, dtype=dtype)
        # The gradient overwrites the saved logits. A second backward pass finds none and computes them again.
        saved_logits_RV, ctx.logits_RV = ctx.logits_RV, None

        def gradient_of_logits(chunk: slice) -> Tensor:
            logits_RV = layer.logits(hidden[chunk]) if saved_logits_RV is None else saved_logits_RV
            column_R1, grad_R1 = targets[chunk, None] - layer.first_id, grad_log_probs[chunk, None]
            entropies = (entropy_S[chunk, None], grad_entropy[chunk, None]) if ctx.differentiate_entropy else None
            # of the soft-cap y = c tanh(l / c): dy = (1 - (y / c)^2) dl; here, because the gradient overwrites y
            slope_RV = logits_RV.div(layer.softcap).square_().neg_().add_(1) if layer.softcap else None
            args = logits_RV, distribution.temperature, peak_S1[chunk], total_S1[chunk], column_R1, grad_R1, entropies
            if threshold_S1 is None:
                gradient_RV = layer.softmax.differentiate(*args)
            else:
                gradient_RV = softmax.differentiate(*args, threshold_S1[chunk])
            return gradient_RV if slope_RV is None else gradient_RV.mul_(slope_RV)

        def pass_on(gradient_RV: Tensor, chunk: slice) -> None:
            if grad_hidden is not None:
                torch.mm(gradient_RV.to(weight.dtype), layer.token_weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                add_product(hidden[chunk], gradient_RV, grad_weight[: gradient_RV.shape[1]])

        for chunk in chunks:
            pass_on(gradient_of_logits(chunk), chunk)
        if grad_hidden is not None and layer.group is not None:
            dist.all_reduce(grad_hidden, group=layer.group)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


@dataclass
class Rows:
    """What the first pass over the logits leaves of every row.

    With v = logit / temperature and z = v - peak, sums are over the tokens that are kept.
    """

    temperature: float
    peak_S1: Tensor  # of v
    threshold_S1: Tensor | None  # of z, where the distribution is cut
    # Sums of exp(z) and of z exp(z); then the logits of the chosen tokens, one sum each, because only one of the ranks
    # has a token's logit and the others add 0. Together they take one all-reduce.
    sums_NS: Tensor
    logits_RV: Tensor | None = None  # all logits, if they were one chunk that nothing has overwritten

    @property
    def total_S1(self) -> Tensor:
        return self.sums_NS[0, :, None]

    @property
    def chosen_SK(self) -> Tensor:
        return self.sums_NS[2:].T

    def log_probs(self, logits_SK: Tensor) -> Tensor:
        return softmax.scaled(logits_SK.clone(), self.temperature) - self.peak_S1 - self.total_S1.log()

    def entropy(self) -> Tensor:
        """Return -sum p log p, which is log(total) - sum(z exp(z)) / total."""
        return self.sums_NS[0].log() - self.sums_NS[1] / self.sums_NS[0]

    def reduce(self, group: dist.ProcessGroup) -> None:
        """Turn sums over this rank's tokens, relative to its own peak, into those over the tokens of all ranks."""
        own_peak_S1 = self.peak_S1.clone()
        dist.all_reduce(self.peak_S1, dist.ReduceOp.MAX, group)
        # Relative to the common peak, z becomes z + shift. So exp(z) is multiplied by exp(shift), and the sum of
        # z exp(z) grows by shift times the total before that.
        shift_S = (own_peak_S1 - self.peak_S1).squeeze(1)
        total_S, weighted_S = self.sums_NS[:2]
        weighted_S += shift_S * total_S
        self.sums_NS[:2] *= shift_S.exp()
        dist.all_reduce(self.sums_NS, dist.ReduceOp.SUM, group)


def scan(
    layer: OutputLayer,
    hidden: Tensor,
    ids_SK: Tensor,
    distribution: Distribution,
    inspect: Callable[[slice, Tensor], None] | None = None,
) -> Rows:
    """Compute all logits once, chunk by chunk, and return what is needed of every row of ``hidden`` [S, H].

    ``ids_SK``: global ids of the chosen tokens, int64. ``inspect`` is called with each chunk and its logits.
    """
    rows = Rows(
        distribution.temperature,
        peak_S1=hidden.new_empty((len(hidden), 1), dtype=_at_least_fp32(hidden)),
        threshold_S1=hidden.new_empty((len(hidden), 1), dtype=_at_least_fp32(hidden)) if distribution.is_cut else None,
        sums_NS=hidden.new_empty((2 + ids_SK.shape[1], len(hidden)), dtype=_at_least_fp32(hidden)),
    )

    def measure(chunk: slice) -> None:  # a function, so that a chunk's logits are freed before the next are computed
        logits_RV = layer.logits(hidden[chunk])
        if inspect is not None:
            inspect(chunk, logits_RV)
        column_RK = ids_SK[chunk] - layer.first_id
        # before the sums, which may overwrite the logits
        rows.sums_NS[2:, chunk] = softmax.take(logits_RV, column_RK).T
        if rows.threshold_S1 is None:
            measured = layer.measure(logits_RV, distribution.temperature)
            rows.peak_S1[chunk], rows.sums_NS[0, chunk], rows.sums_NS[1, chunk] = measured
            if len(logits_RV) == len(hidden) and layer.softmax is not softmax:
                rows.logits_RV = logits_RV
            return
        # The threshold is one over the whole vocabulary, so ranks agree on a row's peak before they cut.
        v_RV = softmax.scaled(logits_RV, distribution.temperature)
        peak_R1 = v_RV.amax(-1, keepdim=True)
        if layer.group is not None:
            dist.all_reduce(peak_R1, dist.ReduceOp.MAX, layer.group)
        z_RV = v_RV.sub_(peak_R1)
        rows.peak_S1[chunk] = peak_R1
        rows.threshold_S1[chunk] = threshold(layer.gather(z_RV), distribution.top_k, distribution.top_p)
        softmax.cut(z_RV, rows.threshold_S1[chunk], column_RK)
        rows.sums_NS[0, chunk], rows.sums_NS[1, chunk] = softmax.sums(z_RV)

    for chunk in layer.chunks(len(hidden), distribution.is_cut, sorts=inspect is not None):
        measure(chunk)
    if layer.group is not None and not layer.invariant:
        rows.reduce(layer.group)
    elif layer.group is not None:
        # every rank has summed over the whole vocabulary; only the chosen tokens' logits are missing
        dist.all_reduce(rows.sums_NS[2:], group=layer.group)
    return rows


def add_product(inputs_TI: Tensor, gradient_TO: Tensor, total_OI: Tensor) -> None:
    """Compute total += gradient^T inputs. The product is rounded once, as it is added: a total in fp32 takes products
    that were not rounded to 16 bits. T tokens, I inputs of a linear, O outputs."""
    if total_OI.dtype == inputs_TI.dtype:
        total_OI.addmm_(gradient_TO.to(total_OI.dtype).T, inputs_TI)
    elif not total_OI.is_cuda:  # whose products have the dtype of their factors
        total_OI.addmm_(gradient_TO.T, inputs_TI.float())
    else:
        factor_OT = gradient_TO.to(inputs_TI.dtype).T
        torch.addmm(total_OI, factor_OT, inputs_TI, out_dtype=total_OI.dtype, out=total_OI)


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# --- several tokens of every position ---------------------------------------------------------------------------------


@torch.no_grad()
def top_candidates(hidden: Tensor, layer: OutputLayer, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the top-``k`` tokens of every row: global ids (int32 [S, k]) and log-probs (fp32 [S, k]), descending.

    Of equally likely tokens the one with the lower id comes first. ``hidden`` [S, H]; no gradient. Raises ValueError
    for a ``k`` that is larger than the vocabulary or not positive.
    """
    if not 0 < k <= layer.vocab_size:
        raise ValueError(f"{k} candidates of a vocabulary of {layer.vocab_size} tokens")
    width = min(k, len(layer.weight))  # the same on all ranks, some of which may have fewer tokens
    keys_SK = torch.full((len(hidden), width), torch.iinfo(torch.int64).min, device=hidden.device)

    def keep_best(chunk: slice, logits_RV: Tensor) -> None:
        best = _keys(logits_RV, layer.first_id).topk(min(width, logits_RV.shape[1])).values
        keys_SK[chunk, : best.shape[1]] = best

    no_ids = hidden.new_empty((len(hidden), 0), dtype=torch.int64)
    rows = scan(layer, hidden, no_ids, Distribution(temperature), keep_best)
    if layer.group is not None:
        of_ranks = [torch.empty_like(keys_SK) for _ in range(layer.group.size())]
        dist.all_gather(of_ranks, keys_SK, layer.group)
        keys_SK = torch.cat(of_ranks, 1).topk(k).values
    ids_SK, logits_SK = _from_keys(keys_SK)
    return ids_SK, rows.log_probs(logits_SK)


@torch.no_grad()
def log_probs_of(hidden: Tensor, layer: OutputLayer, ids: Tensor, temperature: float) -> Tensor:
    """Return the log-probs of several tokens of every row, fp32 [S, K].

    ``ids``: global ids, int32 or int64 [S, K]; ``hidden`` [S, H]; no gradient.
    """
    rows = scan(layer, hidden, ids.long(), Distribution(temperature))
    return rows.log_probs(rows.chosen_SK)


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
