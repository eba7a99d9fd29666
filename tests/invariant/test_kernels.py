"""The Triton kernels, run by Triton's interpreter, or compiled for GPUs without having one. ``tests/gpu`` runs the same
on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from miles_spmd.invariant import split_attention
from miles_spmd.invariant.product_kernel import COLUMNS, DEPTH, ROWS, _product
from tests.interpreted import ENVIRONMENT


def test_kernels() -> None:
    environment = os.environ | ENVIRONMENT
    command = [sys.executable, "-m", "tests.invariant.kernel_checks"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.strip() == "done", done.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("width", [64, 128])
def test_attention_multiplies_by_the_same_instructions_in_prefill_and_decode(capability: int, width: int) -> None:
    """Compiled for GPUs: tiles must have one shape, or the reduction order could differ."""
    numbers = {"query": "*bf16", "keys": "*bf16", "values": "*bf16", "out": "*bf16", "scale": "fp32"}
    numbers |= dict.fromkeys(("lse", "peaks", "totals", "mixes"), "*fp32")
    numbers |= {"starts": "*i32", "slots": "*i32", "lengths": "*i64", "slot_at": "*i64"}
    query = torch.empty(1, 4, width, dtype=torch.bfloat16)
    fixed = split_attention._sizes(width, 1024) | split_attention._tile(query, group=4)
    options = {"num_warps": fixed.pop("num_warps")}
    products = []
    for kernel in (split_attention._attend, split_attention._attend_parts):
        signature = {n: "constexpr" if n in fixed else numbers.get(n, "i32") for n in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs=fixed)
        ptx = compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
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
