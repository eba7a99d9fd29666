"""Grouped experts against a loop in float64; rows depend on themselves alone. ``tests/gpu`` runs the same on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miles_spmd.invariant.expert_kernels import gather_sum
from miles_spmd.invariant.experts import RowGroups
from miles_spmd.training.experts import ExpertsFunction

COUNTS = [3, 0, 17, 1, 40, 0]  # rows of each expert
HIDDEN, WIDTH = 64, 48


class Case(NamedTuple):
    rows: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    gradient: Tensor  # of the result


def case(counts: list[int], dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator().manual_seed(sum(counts))

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    scale = HIDDEN**-0.5
    tensors = (
        numbers(sum(counts), HIDDEN),
        numbers(sum(counts)).sigmoid(),
        numbers(len(counts), 2, WIDTH, HIDDEN) * scale,
        numbers(len(counts), HIDDEN, WIDTH) * scale,
        numbers(sum(counts), HIDDEN),
    )
    return Case(*(t.to(device, torch.float32 if i == 1 else dtype) for i, t in enumerate(tensors)))


def computed(case: Case, counts: list[int]) -> list[Tensor]:
    """The result and the gradients of rows, weights and both layers."""
    leaves = [tensor.clone().requires_grad_() for tensor in case[:-1]]
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32).to(case.rows.device)
    out = ExpertsFunction.apply(*leaves, RowGroups(counts, ends))
    out.backward(case.gradient)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def oracle(case: Case, counts: list[int]) -> list[Tensor]:
    """The same by autograd of plain products, one row after the other, in float64."""
    leaves = [tensor.double().cpu().requires_grad_() for tensor in case[:-1]]
    rows, weights, gate_up, down = leaves
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    out = torch.stack(
        [
            down[expert] @ (F.silu(gate_up[expert, 0] @ row) * (gate_up[expert, 1] @ row) * weight)
            for row, weight, expert in zip(rows, weights, owners)
        ]
    )
    out.backward(case.gradient.double().cpu())
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_as_the_oracle(counts: list[int], dtype: torch.dtype, device: str, tolerance: float) -> None:
    inputs = case(counts, dtype, device)
    for actual, expected in zip(computed(inputs, counts), oracle(inputs, counts), strict=True):
        assert actual.shape == expected.shape
        error = (actual.double().cpu() - expected).norm() / expected.norm()
        assert error < tolerance


def assert_rows_depend_on_themselves_alone(dtype: torch.dtype, device: str) -> None:
    """Among other rows, and in another run, every row has results and gradients that are bitwise equal."""
    both, alone = [5, 0, 700, 1], [0, 0, 300, 0]
    inputs = case(both, dtype, device)
    chosen = slice(5 + 100, 5 + 400)
    part = Case(*(t[chosen] if i in (0, 1, 4) else t for i, t in enumerate(inputs)))
    whole, again, some = computed(inputs, both), computed(inputs, both), computed(part, alone)
    for first, second in zip(whole, again, strict=True):
        assert torch.equal(first, second)
    for number in range(3):  # the result, the gradients of rows and of weights
        assert torch.equal(whole[number][chosen], some[number])


def assert_tokens_collect_their_rows(dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, places = torch.randn(90, 40, generator=generator).to(dtype), torch.randperm(90, generator=generator)
    places = places.view(30, 3)
    total = torch.zeros(30, 40)
    for i in range(3):  # in this order, in fp32, rounded once
        total += rows[places[:, i]].float()
    assert torch.equal(gather_sum(rows.to(device), places.to(device)).cpu(), total.to(dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("counts", [COUNTS, [0, 1]])
def test_result_and_gradients(counts: list[int], dtype: torch.dtype, tolerance: float) -> None:
    assert_as_the_oracle(counts, dtype, "cpu", tolerance)


def test_no_rows_at_all() -> None:
    """A rank whose experts nobody chose still takes part in the step: with gradients of zero."""
    inputs = case([0, 0], torch.float32, "cpu")
    out, grad_rows, grad_weights, grad_gate_up, grad_down = computed(inputs, [0, 0])
    assert (out.shape, grad_rows.shape, grad_weights.shape) == ((0, HIDDEN), (0, HIDDEN), (0,))
    assert not grad_gate_up.any()
    assert not grad_down.any()


def test_rows_depend_on_themselves_alone() -> None:
    assert_rows_depend_on_themselves_alone(torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_collect_their_rows(dtype: torch.dtype) -> None:
    assert_tokens_collect_their_rows(dtype, "cpu")
