"""Matrix products whose rows do not feel each other.

On a GPU the product of 16-bit numbers is SGLang's batch-invariant one, which sums over the inner dimension in one order
whatever the shape. On a CPU it is the BLAS library's on at least four rows: it takes fewer along another path, which
rounds in another way. One thread is needed there; more share a product out by its shape.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_ROWS = 4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [..., K] times ``weight`` [N, K] transposed, plus ``bias`` [N]. No gradient passes."""
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda and x.itemsize == 2:
        from sglang.srt.batch_invariant_ops.batch_invariant_ops import matmul_persistent

        product = matmul_persistent(rows.contiguous(), weight.t())
    else:
        product = torch.mm(_padded(rows), weight.t())[: len(rows)]
    if bias is not None:
        product += bias
    return product.view(*x.shape[:-1], len(weight))


def _padded(rows: Tensor) -> Tensor:
    return pad(rows, (0, 0, 0, _ROWS - len(rows))) if len(rows) < _ROWS else rows
