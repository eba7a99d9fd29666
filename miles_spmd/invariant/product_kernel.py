"""A Triton kernel for narrow matrix products with a result in fp32: the logits of routers.

The reduction order is the same for every number of rows, because tiles are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, DEPTH = 32, 32, 64  # of a tile


def product_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x`` [T, K] times ``weight`` [N, K] transposed, fp32 [T, N], summed in fp32. The factors may be of
    different dtypes: 16-bit ones are computed with as they are where both are of the same."""
    if x.dtype != weight.dtype:
        x, weight = x.float(), weight.float()
    x, weight = x.contiguous(), weight.contiguous()
    (rows, depth), columns = x.shape, len(weight)
    out = torch.empty(rows, columns, dtype=torch.float32, device=x.device)
    if rows:
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))
        _product[grid](x, weight, out, rows, columns, depth, BM=ROWS, BN=COLUMNS, BK=DEPTH)
    return out


@triton.jit(do_not_specialize=["rows"])
def _product(  # type: ignore[no-untyped-def]
    x, weight, out, rows, columns, depth, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, depth, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(
            x + row[:, None] * depth + k[None, :], mask=(row < rows)[:, None] & (k < depth)[None, :], other=0.0
        )
        right = tl.load(
            weight + column[None, :] * depth + k[:, None],
            mask=(column < columns)[None, :] & (k < depth)[:, None],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    place = out + row[:, None] * columns + column[None, :]
    tl.store(place, total, mask=(row < rows)[:, None] & (column < columns)[None, :])
