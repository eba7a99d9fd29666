"""Top-k and top-p: which tokens of a distribution can be sampled. Engines and trainer share this definition.

Sources: A. Fan et al., "Hierarchical Neural Story Generation" (2018), for top-k; A. Holtzman et al., "The Curious Case
of Neural Text Degeneration" (2020), for top-p.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 2**52  # probabilities are summed as integers of this unit: exact in any order, so equal on every device
FEW = 1024  # tokens that nearly always contain the top-p mass; sorting the whole vocabulary is slow


def threshold(scores: Tensor, top_k: int | Tensor, top_p: float | Tensor) -> Tensor:
    """Return the lowest score that is kept, [rows, 1]: a token is kept if its score is not below it.

    ``scores`` [rows, V]: logits divided by the temperature, or log-probs. ``top_k`` (-1, or V and above: no limit) and
    ``top_p`` (1: no limit) are numbers for all rows or tensors [rows, 1]. A token is kept if it is among the
    ``top_k`` most probable, and the tokens before it have a total probability below ``top_p``; both refer to the
    distribution before truncation. The top-1 token is always kept. Tokens as probable as the last one are kept with it,
    so that the set does not depend on the order of equal scores.
    """
    vocabulary = scores.shape[-1]
    top_k, top_p = torch.as_tensor(top_k, device=scores.device), torch.as_tensor(top_p, device=scores.device)
    limit = top_k.where((top_k > 0) & (top_k < vocabulary), vocabulary)
    log_total = scores.logsumexp(-1, keepdim=True)
    largest = int(limit.max())
    for candidates in (min(FEW, largest), largest):
        ordered = scores.topk(candidates, dim=-1).values
        probs = (ordered - log_total).exp()
        units = probs.double().mul_(UNIT).long()
        above = (units.cumsum(-1) - units).double() / UNIT  # total probability of the tokens before each
        rank = torch.arange(candidates, device=scores.device)
        kept = (rank < limit) & ((above < top_p) | (top_p >= 1))
        if not kept[:, -1].any():  # no row's set extends beyond the candidates
            break
    return ordered.gather(-1, kept.sum(-1, keepdim=True).sub_(1).clamp_(min=0))


def truncated(scores: Tensor, top_k: int | Tensor, top_p: float | Tensor) -> Tensor:
    """Return log-probs [rows, V] of the truncated distribution: renormalised over the kept tokens, -inf elsewhere."""
    return scores.masked_fill(scores < threshold(scores, top_k, top_p), float("-inf")).log_softmax(-1)
