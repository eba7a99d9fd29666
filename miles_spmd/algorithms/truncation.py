"""Top-k and top-p: which tokens of a distribution may be sampled. One definition, for engines and trainer alike.

Sources: A. Fan et al., "Hierarchical Neural Story Generation" (2018), for top-k; A. Holtzman et al., "The Curious Case
of Neural Text Degeneration" (2020), for top-p.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 2**52  # of a probability as a whole number: sums of such are exact, so they are the same on every device
FEW = 1024  # tokens that nearly always hold the probability that top-p asks for: to sort a whole vocabulary takes long


def threshold(scores: Tensor, top_k: int | Tensor, top_p: float | Tensor) -> Tensor:
    """The lowest score that is kept, [rows, 1]: a token is kept if its score is not below.

    ``scores`` [rows, V]: logits divided by the temperature, or log-probs. ``top_k`` (-1, or V and above: no limit) and
    ``top_p`` (1: no limit) hold for all rows, or are tensors [rows, 1]. Kept are the ``top_k`` likeliest tokens that
    are also in the smallest set of probability ``top_p`` or more, which is to say those that have less than ``top_p``
    above them; both of the uncut distribution, and the likeliest token always. Tokens that are as likely as the last
    one are kept with it, so that the set depends on no order among equals.
    """
    vocabulary = scores.shape[-1]
    top_k, top_p = torch.as_tensor(top_k, device=scores.device), torch.as_tensor(top_p, device=scores.device)
    limit = top_k.where((top_k > 0) & (top_k < vocabulary), vocabulary)
    log_total = scores.logsumexp(-1, keepdim=True)
    most = int(limit.max())
    for candidates in (min(FEW, most), most):
        ordered = scores.topk(candidates, dim=-1).values
        probs = (ordered - log_total).exp()
        parts = probs.double().mul_(UNIT).long()
        above = (parts.cumsum(-1) - parts).double() / UNIT
        rank = torch.arange(candidates, device=scores.device)
        kept = (rank < limit) & ((above < top_p) | (top_p >= 1))
        if not kept[:, -1].any():
            break
    return ordered.gather(-1, kept.sum(-1, keepdim=True).sub_(1).clamp_(min=0))


def truncated(scores: Tensor, top_k: int | Tensor, top_p: float | Tensor) -> Tensor:
    """Log-probs [rows, V] of the distribution that is sampled from: renormalised over what is kept, -inf elsewhere."""
    return scores.masked_fill(scores < threshold(scores, top_k, top_p), float("-inf")).log_softmax(-1)
