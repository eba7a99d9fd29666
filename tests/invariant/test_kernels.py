"""The Triton kernels, run by Triton's interpreter, or compiled for GPUs without having one. ``tests/gpu`` runs the same
on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from miles_spmd.invariant import split_attention, split_attention_backward
from miles_spmd.invariant.product_kernel import COLUMNS, DEPTH, ROWS, _product
from miles_spmd.models.attention import PLAIN, Form
from tests.interpreted import ENVIRONMENT


def test_kernels() -> None:
    environment = os.environ | ENVIRONMENT
    command = [sys.executable, "-m", "tests.invariant.kernel_checks"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout.strip() == "done", done.stderr


NUMBERS = (
    dict.fromkeys(
        ("query", "keys", "values", "out", "key", "value", "gradient", "of_query", "of_key", "of_value"), "*bf16"
    )
    | dict.fromkeys(("lse", "peaks", "totals", "mixes", "shift", "sinks"), "*fp32")
    | dict.fromkeys(("inner", "outer", "scale"), "fp32")
    | {"starts": "*i32", "key_starts": "*i32", "slots": "*i32", "lengths": "*i64", "slot_at": "*i64"}
)


def compiled(kernel: Any, capability: int, fixed: dict[str, Any], options: dict[str, int]) -> Any:
    signature = {n: "constexpr" if n in fixed else NUMBERS.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs={n: x for n, x in fixed.items() if n in signature})
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("form", [PLAIN, Form(4096, 50.0)])
def test_attention_multiplies_by_the_same_instructions_in_prefill_and_decode(
    capability: int, width: int, form: Form
) -> None:
    """Compiled for GPUs: tiles must have one shape, or the reduction order could differ."""
    query, cache = torch.empty(1, 4, width, dtype=torch.bfloat16), torch.empty(1, 1, width)
    fixed = {"WINDOW": form.window, "CAPPED": form.softcap > 0} | ({} if form.window else {"sinks": None})
    fixed |= split_attention._sizes(split_attention.Keys(cache, cache, *[cache] * 3), 1024)
    fixed |= split_attention._tile(query, group=4)
    options = {"num_warps": fixed.pop("num_warps")}
    products = []
    for kernel in (split_attention._attend, split_attention._attend_parts):
        ptx = compiled(kernel, capability, fixed, options).asm["ptx"]
        products.append(Counter(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.m\d+n\d+k\d+", ptx)))
    assert products[0] == products[1]
    assert products[0].total() > 0


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_products_are_not_rounded_to_tf32(dtype: str) -> None:
    """Compiled for a GPU: fp32 factors are multiplied as they are, 16-bit ones by tensor cores."""
    fixed = {"BM": ROWS, "BN": COLUMNS, "BK": DEPTH}
    numbers = {"x": f"*{dtype}", "weight": f"*{dtype}", "out": "*fp32"}
    signature = {n: "constexpr" if n in fixed else numbers.get(n, "i32") for n in _product.arg_names}
    source = ASTSource(_product, signature, constexprs=fixed)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "tf32" not in ptx
    assert ("fma.rn.f32" in ptx) == (dtype == "fp32")
    assert ("mma" in ptx) == (dtype == "bf16")


@pytest.mark.parametrize("width", [64, 128, 256])
def test_gradients_of_attention_fit_into_shared_memory(width: int) -> None:
    """Of the smallest GPUs of compute capability 8: 99 KiB."""
    rows, keys, warps = next(
        split_attention_backward.TILES[most] for most in split_attention_backward.TILES if width <= most
    )
    fixed = {"GROUP": 2, "WIDTH": width, "DIM": width, "ROWS": rows, "KEYS": keys, "WINDOW": 4096, "CAPPED": True}
    for kernel in (split_attention_backward._of_rows, split_attention_backward._of_keys):
        assert compiled(kernel, 80, fixed, {"num_warps": warps, "num_stages": 2}).metadata.shared <= 99 * 1024
