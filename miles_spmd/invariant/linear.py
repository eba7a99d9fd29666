"""Matrix products whose rows do not depend on each other.

On a GPU the product of 16-bit numbers is SGLang's batch-invariant one, which has one reduction order over the inner
dimension whatever the shape. On a CPU it is the BLAS library's on at least sixteen rows: it computes fewer by other
kernels, whose reduction order differs (below four on AMD, below sixteen on Intel with AVX-512). It requires one thread:
several divide a product by its shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

_ROWS = 16  # least rows of a product on a CPU
_DEEPGEMM_ROWS = 16  # least rows of a weight for which SGLang multiplies by DeepGEMM


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, partial_sums: int = 1) -> Tensor:
    """Return ``x`` [..., K] times ``weight`` [N, K] transposed, plus ``bias`` [N], without a gradient.

    ``partial_sums``: the sum over K consists of so many products over equal parts of K, each rounded, combined by
    :func:`tree_sum`. Ranks that each have one part, or any 2^n parts, get results that are bitwise equal to one rank's
    if they combine theirs by :func:`tree_sum`, too.
    """
    if partial_sums > 1:
        products = map(linear, x.chunk(partial_sums, -1), weight.chunk(partial_sums, 1))
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


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return :func:`linear` in fp32, without a gradient, where ``x`` and ``weight`` may be of 16 bits: products are not
    rounded to the dtype of their factors."""
    if not x.is_cuda:
        return linear(x.float(), weight.float(), None if bias is None else bias.float())
    from miles_spmd.invariant.product_kernel import product_fp32

    product = product_fp32(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))
    return product if bias is None else product.add_(bias)


def tree_sum(terms: Sequence[Tensor]) -> Tensor:
    """Return the sum of 2^n ``terms``: neighbours are added, then neighbours among their sums, and so on. Overwrites
    some of the terms."""
    while len(terms) > 1:
        terms = [left.add_(right) for left, right in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """Multiply by SGLang's kernel, also by a part of a weight.

    SGLang chooses between two kernels, and takes the second one for a weight that is not contiguous. A part's product
    has to be that of the kernel that multiplies the same part as a weight of its own on another rank.
    """
    from sglang.srt.batch_invariant_ops import batch_invariant_ops as ops

    if weight.is_contiguous():
        return ops.matmul_persistent(rows, weight.t())
    deep = ops._ENABLE_MM_DEEPGEMM and ops.ENABLE_JIT_DEEPGEMM
    deep = deep and rows.dtype is torch.bfloat16 and len(weight) >= _DEEPGEMM_ROWS
    return (ops._matmul_persistent_deepgemm if deep else ops._matmul_persistent_triton)(rows, weight.t())


def _padded(rows: Tensor) -> Tensor:
    return pad(rows, (0, 0, 0, _ROWS - len(rows))) if len(rows) < _ROWS else rows
