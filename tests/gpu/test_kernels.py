"""The Triton kernels of norms, rotary positions, SwiGLU, products, digests and attention on a GPU, at models' sizes."""

from __future__ import annotations

import pytest
import torch

from miles_spmd.models.attention import Form
from tests.gpu.machine import needs
from tests.invariant.kernel_checks import (
    DTYPES,
    FORMS,
    check_attention,
    check_digests,
    check_norm,
    check_product,
    check_rotation,
    check_swiglu,
)

pytestmark = [needs(1), pytest.mark.parametrize("dtype", DTYPES)]


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5000, 128), (3, 1024), (700, 2560), (1100, 4096), (9, 100)])
def test_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    check_norm("cuda", dtype, rows, width)


@pytest.mark.parametrize(("heads", "width", "rotary_dim"), [(32, 128, 128), (2, 64, 64), (3, 20, 20), (8, 128, 96)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation(dtype: torch.dtype, heads: int, width: int, rotary_dim: int, interleaved: bool) -> None:
    check_rotation("cuda", dtype, 999, heads, width, rotary_dim, interleaved)


@pytest.mark.parametrize("width", [9728, 3072, 100])
def test_swiglu(dtype: torch.dtype, width: int) -> None:
    check_swiglu("cuda", dtype, 333, width)


@pytest.mark.parametrize(("rows", "columns", "depth"), [(5000, 256, 7168), (300, 160, 2048), (70, 40, 200)])
def test_product(dtype: torch.dtype, rows: int, columns: int, depth: int) -> None:
    check_product("cuda", dtype, rows, columns, depth)


@pytest.mark.parametrize("columns", [2048, 4104, 1301])
def test_digests(dtype: torch.dtype, columns: int) -> None:
    check_digests("cuda", dtype, columns)


@pytest.mark.parametrize(
    ("heads", "width"), [((32, 8), 128), ((32, 8), 64), ((14, 2), 64), ((24, 8), 80), ((16, 4), 256)]
)
@pytest.mark.parametrize("split", [64, 1024])
def test_attention(dtype: torch.dtype, heads: tuple[int, int], width: int, split: int) -> None:
    check_attention("cuda", dtype, heads, width, split)


@pytest.mark.parametrize(("form", "with_sinks"), [*FORMS, (Form(1500, 50.0), True)])
@pytest.mark.parametrize(("heads", "width"), [((64, 8), 64), ((16, 8), 256)])
@pytest.mark.parametrize("split", [64, 1024])
def test_forms_of_attention(
    dtype: torch.dtype, heads: tuple[int, int], width: int, split: int, form: Form, with_sinks: bool
) -> None:
    check_attention("cuda", dtype, heads, width, split, form, with_sinks)
