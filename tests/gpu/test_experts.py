"""Grouped experts on a GPU: the kernels against a loop in float64, and what their rows depend on."""

from __future__ import annotations

import pytest
import torch

from miles_spmd.invariant.expert_kernels import top_k
from tests.gpu.machine import needs
from tests.invariant.test_experts import (
    assert_arranged_as_by_a_loop,
    assert_chosen_as_by_megatron,
    assert_mixed_as_by_a_loop,
)
from tests.invariant.test_routing import CASES, assert_gradient
from tests.invariant.test_routing import assert_rows_depend_on_themselves_alone as assert_routed
from tests.training.test_experts import (
    COUNTS,
    FORMS,
    assert_as_the_oracle,
    assert_rows_depend_on_themselves_alone,
    assert_tokens_collect_their_rows,
)

pytestmark = needs(1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("counts", [COUNTS, [0, 1], [0] * 100 + [513, 7] + [64] * 26])
@pytest.mark.parametrize("form", FORMS)
def test_result_and_gradients(form: str, counts: list[int], dtype: torch.dtype, tolerance: float) -> None:
    assert_as_the_oracle(counts, dtype, "cuda", tolerance, FORMS[form])


@pytest.mark.parametrize("form", FORMS)
def test_rows_depend_on_themselves_alone(form: str) -> None:
    assert_rows_depend_on_themselves_alone(torch.bfloat16, "cuda", FORMS[form])


@pytest.mark.parametrize("name", CASES)
def test_routing(name: str) -> None:
    assert_gradient(CASES[name], "cuda")
    assert_routed(CASES[name], "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_collect_their_rows(dtype: torch.dtype) -> None:
    assert_tokens_collect_their_rows(dtype, "cuda")


@pytest.mark.parametrize("tokens", [1, 700])
def test_rows_are_arranged(tokens: int) -> None:
    assert_arranged_as_by_a_loop(tokens, "cuda")


@pytest.mark.parametrize("tokens", [2, 400])
def test_mixtures(tokens: int) -> None:
    assert_mixed_as_by_a_loop(tokens, torch.bfloat16, "cuda", 1e-2)


@pytest.mark.parametrize("softmax_first", [False, True])
def test_tokens_choose_as_megatrons(softmax_first: bool) -> None:
    assert_chosen_as_by_megatron(softmax_first, torch.bfloat16, "cuda")


def test_of_equal_values_the_first_is_taken() -> None:
    values = torch.randn(200, 100, generator=torch.Generator().manual_seed(0)).mul(2).round()
    best, where = (found.cpu() for found in top_k(values.to("cuda", torch.bfloat16), 8))
    expected = [sorted(range(100), key=lambda i: (-row[i], i))[:8] for row in values.tolist()]
    assert where.tolist() == expected
    assert torch.equal(best, values.gather(1, where))
