"""Matrix products by ranks that share the inner or the outer dimension, against one rank's. ``tests/gpu`` has bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from miles_spmd.invariant.linear import linear, tree_sum


def factors(rows: int, inner: int, outer: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((rows, inner), (outer, inner)))
    return x.to(device, dtype), (weight * inner**-0.5).to(device, dtype)


def assert_ranks_make_the_same_sum(rows: int, inner: int, outer: int, dtype: torch.dtype, device: str) -> None:
    """Four partial sums: on one rank, on two with two each, on four with one each, whose weights are separate
    tensors."""
    x, weight = factors(rows, inner, outer, dtype, device)
    alone = linear(x, weight, partial_sums=4)
    for ranks in (2, 4):
        parts = zip(x.chunk(ranks, 1), weight.chunk(ranks, 1))
        terms = [linear(a.contiguous(), w.contiguous(), partial_sums=4 // ranks) for a, w in parts]
        assert torch.equal(tree_sum(terms), alone)
    exact = x.double() @ weight.double().T
    assert (alone - exact).norm() / exact.norm() < 4 * torch.finfo(dtype).eps


def assert_ranks_make_the_same_columns(rows: int, inner: int, outer: int, dtype: torch.dtype, device: str) -> None:
    x, weight = factors(rows, inner, outer, dtype, device)
    alone = linear(x, weight)
    for ranks in (2, 4):
        assert torch.equal(torch.cat([linear(x, part.contiguous()) for part in weight.chunk(ranks)], 1), alone)


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_sums(rows: int) -> None:
    assert_ranks_make_the_same_sum(rows, 256, 64, torch.float32, "cpu")


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_columns(rows: int) -> None:
    assert_ranks_make_the_same_columns(rows, 64, 256, torch.float32, "cpu")


@pytest.mark.parametrize("inner", [48, 64, 128, 192, 512, 1536])
@pytest.mark.parametrize("outer", [16, 97, 256])
def test_a_row_does_not_depend_on_how_many_there_are(inner: int, outer: int) -> None:
    x, weight = factors(300, inner, outer, torch.float32, "cpu")
    together = linear(x, weight)
    for rows in (*range(1, 34), 63, 64, 65, 129):
        for first in (0, 7):
            assert torch.equal(linear(x[first : first + rows], weight), together[first : first + rows]), rows


def test_a_tree_is_added_level_by_level() -> None:
    big, small = 2.0**24, 1.0  # big + small rounds to big
    terms = [torch.tensor(value) for value in (big, small, small, -big)]
    assert tree_sum(terms).item() == (big + 0) + (1 - big)  # and not ((big + 1) + 1) - big
