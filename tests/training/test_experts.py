"""Grouped experts against a loop in float64; rows depend on themselves alone. ``tests/gpu`` runs the same on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miles_spmd.invariant.expert_kernels import gather_sum
from miles_spmd.invariant.experts import RowGroups
from miles_spmd.models.blocks.experts import SWIGLU, ClampedSwiGLU, Experts
from miles_spmd.training.experts import ExpertsFunction

COUNTS = [3, 0, 17, 1, 40, 0]  # rows of each expert
HIDDEN, WIDTH = 64, 48
FORMS = {
    "swiglu": SWIGLU,
    "gpt_oss": Experts(ClampedSwiGLU(limit=1.0), bias=True, interleaved=True),
    "biases": Experts(bias=True),
    "clamped": Experts(ClampedSwiGLU(limit=1.0)),
}


class Case(NamedTuple):
    rows: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    biases: tuple[Tensor, ...]  # of both layers
    gradient: Tensor  # of the result


def case(counts: list[int], dtype: torch.dtype, device: str, form: Experts = SWIGLU) -> Case:
    generator = torch.Generator().manual_seed(sum(counts))

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    scale, experts = HIDDEN**-0.5, len(counts)
    sides = (WIDTH, 2) if form.interleaved else (2, WIDTH)
    return Case(
        numbers(sum(counts), HIDDEN),
        numbers(sum(counts)).float().sigmoid(),
        numbers(experts, *sides, HIDDEN) * scale,
        numbers(experts, HIDDEN, WIDTH) * scale,
        (numbers(experts, 2 * WIDTH), numbers(experts, HIDDEN)) if form.bias else (),
        numbers(sum(counts), HIDDEN),
    )


def leaves_of(case: Case, dtype: torch.dtype | None = None, device: str | None = None) -> list[Tensor]:
    tensors = (*case[:4], *case.biases)
    return [tensor.to(device or tensor.device, dtype or tensor.dtype, copy=True).requires_grad_() for tensor in tensors]


def computed(case: Case, counts: list[int], form: Experts = SWIGLU) -> list[Tensor]:
    """The result and the gradients of rows, weights, both layers and their biases."""
    leaves = leaves_of(case)
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32).to(case.rows.device)
    out = ExpertsFunction.apply(*leaves[:4], RowGroups(counts, ends), form, *leaves[4:])
    out.backward(case.gradient)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def oracle(case: Case, counts: list[int], form: Experts = SWIGLU) -> list[Tensor]:
    """The same by autograd of plain products, one row after the other, in float64."""
    leaves = leaves_of(case, torch.float64, "cpu")
    rows, weights, gate_up, down, *biases = leaves
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    results = []
    for row, weight, expert in zip(rows, weights, owners):
        both = gate_up[expert].flatten(0, 1) @ row + (biases[0][expert] if biases else 0)
        gate, up = both.view(gate_up.shape[1:3]).unbind(1 if form.interleaved else 0)
        if form.activation is None:
            inner = F.silu(gate) * up
        else:
            limit = form.activation.limit
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            inner = gate * torch.sigmoid(form.activation.alpha * gate) * (up + 1)
        results.append((down[expert] @ inner + (biases[1][expert] if biases else 0)) * weight)
    out = torch.stack(results)
    out.backward(case.gradient.double().cpu())
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_as_the_oracle(
    counts: list[int], dtype: torch.dtype, device: str, tolerance: float, form: Experts = SWIGLU
) -> None:
    if dtype is torch.bfloat16 and form.activation:
        # rounded numbers may lie on the other side of a limit, where they have a gradient: none reaches this one
        form = replace(form, activation=ClampedSwiGLU())
    inputs = case(counts, dtype, device, form)
    for actual, expected in zip(computed(inputs, counts, form), oracle(inputs, counts, form), strict=True):
        assert actual.shape == expected.shape
        error = (actual.double().cpu() - expected).norm() / expected.norm()
        assert error < tolerance


def assert_rows_depend_on_themselves_alone(dtype: torch.dtype, device: str, form: Experts = SWIGLU) -> None:
    """Among other rows, and in another run, every row has results and gradients that are bitwise equal."""
    both, alone = [5, 0, 700, 1], [0, 0, 300, 0]
    inputs = case(both, dtype, device, form)
    chosen = slice(5 + 100, 5 + 400)
    part = inputs._replace(**{name: getattr(inputs, name)[chosen] for name in ("rows", "weights", "gradient")})
    whole, again, some = computed(inputs, both, form), computed(inputs, both, form), computed(part, alone, form)
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
@pytest.mark.parametrize("form", FORMS)
def test_result_and_gradients(form: str, counts: list[int], dtype: torch.dtype, tolerance: float) -> None:
    assert_as_the_oracle(counts, dtype, "cpu", tolerance, FORMS[form])


def test_no_rows_at_all() -> None:
    """A rank whose experts nobody chose still takes part in the step: with gradients of zero."""
    inputs = case([0, 0], torch.float32, "cpu")
    out, grad_rows, grad_weights, grad_gate_up, grad_down = computed(inputs, [0, 0])
    assert (out.shape, grad_rows.shape, grad_weights.shape) == ((0, HIDDEN), (0, HIDDEN), (0,))
    assert not grad_gate_up.any()
    assert not grad_down.any()


@pytest.mark.parametrize("form", FORMS)
def test_rows_depend_on_themselves_alone(form: str) -> None:
    assert_rows_depend_on_themselves_alone(torch.float32, "cpu", FORMS[form])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_collect_their_rows(dtype: torch.dtype) -> None:
    assert_tokens_collect_their_rows(dtype, "cpu")
