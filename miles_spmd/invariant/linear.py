"""Matrix products whose rows do not feel each other.

On a GPU the product of 16-bit numbers is SGLang's batch-invariant one, which sums over the inner dimension in one order
whatever the shape. On a CPU it is the BLAS library's on at least four rows: it takes fewer along another path, which
rounds in another way. One thread is needed there; more share a product out by its shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

_ROWS = 16
_DEEPGEMM_ROWS = 16  # of a weight, from which on SGLang multiplies by DeepGEMM


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, terms: int = 1) -> Tensor:
    """``x`` [..., K] times ``weight`` [N, K] transposed, plus ``bias`` [N]. No gradient passes.

    ``terms``: the sum over K is one of so many products over K / terms each, every one rounded and added by
    :func:`tree_sum`. Ranks that have K / terms of the inner dimension, or any 2^n times as much, come to the same bits
    if they add up theirs by it, too.
    """
    if terms > 1:
        products = map(linear, x.chunk(terms, -1), weight.chunk(terms, 1))
        product = tree_sum([*products])
        return product if bias is None else product.add_(bias)
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda and x.itemsize == 2:
        product = _product(rows.contiguous(), weight)
    else:
        product = torch.mm(_padded(rows), weight.t())[: len(rows)]
    if bias is not None:
        product += bias
    return product.view(*x.shape[:-1], len(weight))


def tree_sum(terms: Sequence[Tensor]) -> Tensor:
    """Of 2^n, some of which are overwritten: neighbours are added, then neighbours among their sums, and so on."""
    while len(terms) > 1:
        terms = [left.add_(right) for left, right in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """Of parts of matrices, too, by the kernel that takes whole ones."""
    from sglang.srt.batch_invariant_ops import batch_invariant_ops as ops

    if weight.is_contiguous():
        return ops.matmul_persistent(rows, weight.t())
    deep = ops._ENABLE_MM_DEEPGEMM and ops.ENABLE_JIT_DEEPGEMM
    deep = deep and rows.dtype is torch.bfloat16 and len(weight) >= _DEEPGEMM_ROWS
    return (ops._matmul_persistent_deepgemm if deep else ops._matmul_persistent_triton)(rows, weight.t())


def _padded(rows: Tensor) -> Tensor:
    return pad(rows, (0, 0, 0, _ROWS - len(rows))) if len(rows) < _ROWS else rows
