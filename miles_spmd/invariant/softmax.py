"""Log-probs over a vocabulary.

The trainer needs those of single tokens and no copy of the logits. Its sums have the same reduction order, so its
results are bitwise equal: ``training.softmax`` on a CPU, ``training.softmax_kernel`` on a GPU.
"""

from __future__ import annotations

from torch import Tensor


def log_softmax(values: Tensor) -> Tensor:
    """Return (value - peak) - log(sum of exp(value - peak)) of every row of ``values``, fp32 [R, V]."""
    if values.is_cuda:
        from sglang.srt.batch_invariant_ops import batch_invariant_ops

        return batch_invariant_ops.log_softmax(values, -1)
    z = values - values.amax(-1, keepdim=True)
    return z.sub_(z.exp().sum(-1, keepdim=True).log_())
