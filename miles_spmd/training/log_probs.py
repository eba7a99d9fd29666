"""Log-probs and entropy from hidden states, without ever holding all logits.

Rows are taken in the chunks of :class:`OutputLayer`: their logits are computed, reduced to a few numbers per row, and
computed again for the gradient. The vocabulary may be split over the ranks of a tensor-parallel group.

Shape suffixes: S scored positions, R those of a chunk, H hidden size, V token ids of this rank, K tokens of each
position, N sums of each position. "1" is a dimension of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles_spmd.algorithms.truncation import threshold
from miles_spmd.training import softmax
from miles_spmd.training.output_layer import OutputLayer

CUT_OFF = -1e4  # in place of a logit that is cut: exp is 0, as of -inf, but 0 times it is not NaN


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
    hidden: Tensor,
    layer: OutputLayer,
    targets: Tensor,
    distribution: Distribution,
    *,
    differentiate_entropy: bool = False,
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
        layer = replace(layer, weight=weight)
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
            column_R1, total_R1 = layer.columns(targets[chunk, None]), total_S1[chunk]
            grad_R1, entropy_and_grad = grad_log_probs[chunk, None], None
            if ctx.differentiate_entropy:
                entropy_and_grad = entropy_S[chunk, None], grad_entropy[chunk, None]
            if threshold_S1 is None:
                return layer.softmax.differentiate(
                    logits_RV, distribution.temperature, peak_S1[chunk], total_R1, column_R1, grad_R1, entropy_and_grad
                )
            z_RV = softmax.scaled(logits_RV, distribution.temperature).sub_(peak_S1[chunk])
            _cut(z_RV, threshold_S1[chunk], column_R1)
            return softmax.differentiate_relative(
                z_RV, distribution.temperature, total_R1, column_R1, grad_R1, entropy_and_grad
            )

        def pass_on(gradient_RV: Tensor, chunk: slice) -> None:
            if grad_hidden is not None:
                torch.mm(gradient_RV.to(weight.dtype), layer.token_weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                _add_product(grad_weight[: gradient_RV.shape[1]], gradient_RV, hidden[chunk])

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
        column_RK = layer.columns(ids_SK[chunk])
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
        _cut(z_RV, rows.threshold_S1[chunk], column_RK)
        rows.sums_NS[0, chunk], rows.sums_NS[1, chunk] = softmax.sums(z_RV)

    for chunk in layer.chunks(len(hidden), distribution.is_cut, sorts=inspect is not None):
        measure(chunk)
    if layer.group is not None and not layer.invariant:
        rows.reduce(layer.group)
    elif layer.group is not None:
        # every rank has summed over the whole vocabulary; only the chosen tokens' logits are missing
        dist.all_reduce(rows.sums_NS[2:], group=layer.group)
    return rows


def _cut(z_RV: Tensor, threshold_R1: Tensor, column_R1: Tensor) -> None:
    """Replace what is below the threshold by CUT_OFF, in place, except for targets that are this rank's."""
    target_R1, here_R1 = softmax.take(z_RV, column_R1), softmax.is_here(z_RV, column_R1)
    z_RV.masked_fill_(z_RV < threshold_R1, CUT_OFF)
    index_R1 = column_R1.clamp(0, z_RV.shape[1] - 1)
    z_RV.scatter_(1, index_R1, torch.where(here_R1, target_R1, z_RV.gather(1, index_R1)))


def _add_product(total_VH: Tensor, gradient_RV: Tensor, hidden_RH: Tensor) -> None:
    """Compute total += gradient^T hidden. A total in fp32 takes products that were not rounded to 16 bits."""
    if total_VH.dtype == hidden_RH.dtype:
        total_VH.addmm_(gradient_RV.to(total_VH.dtype).T, hidden_RH)
    elif not total_VH.is_cuda:  # whose products have the dtype of their factors
        total_VH.addmm_(gradient_RV.T, hidden_RH.float())
    else:
        factor_VR = gradient_RV.to(hidden_RH.dtype).T
        torch.addmm(total_VH, factor_VR, hidden_RH, out_dtype=total_VH.dtype, out=total_VH)


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
