"""The head's kernels, run by Triton's interpreter, against the tensor operations and a softmax in float64. Compiled for
a GPU, they have the reduction order of the engine's kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from miles_spmd.training import softmax_kernel
from tests.ranks import Ranks

PROGRAM = """
import itertools
import torch
from miles_spmd.training import softmax, softmax_kernel

softmax_kernel.BLOCK, softmax_kernel.WIDE = 64, 128
generator = torch.Generator().manual_seed(0)
for dtype, columns, temperature, with_entropy in itertools.product(
    (torch.float32, torch.bfloat16), (1, 64, 300), (1.0, 0.7), (False, True)
):
    rows = 5
    logits = (4 * torch.randn(rows, columns, generator=generator)).to(dtype)
    logits[1] *= 20
    logits[2] = -3.0
    column = torch.tensor([[0], [columns - 1], [-1], [columns], [columns // 2]])
    grad, grad_entropy = torch.randn(2, rows, 1, generator=generator)

    v = (logits.double() / temperature).requires_grad_()
    log_p = v.log_softmax(-1)
    here = (column >= 0) & (column < columns)
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    total = (v - v.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)
    log_p_of = torch.where(here, log_p.gather(1, column.clamp(0, columns - 1)), -torch.logsumexp(v, -1, keepdim=True))
    loss = (grad * log_p_of).sum() + with_entropy * (grad_entropy * entropy).sum()
    expected = torch.autograd.grad(loss, v)[0] / temperature

    case = dtype, columns, temperature, with_entropy
    before = logits.clone()
    peak, *sums = softmax_kernel.measure(logits, temperature)
    assert torch.equal(logits, before), "measuring overwrites nothing"
    assert torch.equal(peak, softmax.measure(logits.clone(), temperature)[0]), case
    for found, exact in zip(sums, softmax.measure(logits.double(), temperature)[1:], strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=3e-6, atol=1e-5)
    entropy_and_grad = (entropy.detach().float(), grad_entropy) if with_entropy else None
    arguments = temperature, peak, total.detach().float(), column, grad, entropy_and_grad
    reference = softmax.differentiate(logits.clone(), *arguments)
    gradient = softmax_kernel.differentiate(logits, *arguments)
    assert gradient is logits, case
    tolerance = 2**-7 if dtype is torch.bfloat16 else 2e-6  # the interpreter cuts digits off
    for exact in (expected, reference.double()):
        scale = exact.abs() if dtype is torch.bfloat16 else exact.abs().amax(-1, keepdim=True)
        assert ((gradient.double() - exact).abs() <= tolerance * scale + 2e-5).all(), case
    sliced = logits.new_zeros(rows, columns + 7)[:, :columns].copy_(before)  # rows apart, each on its own
    for row in range(rows):
        alone = softmax_kernel.measure(sliced[row : row + 1], temperature)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, (peak, *sums))), case
for empty in (softmax_kernel.measure(logits[:0], 1.0)):
    assert len(empty) == 0
print("done")
"""


def test_kernels() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.strip() == "done", done.stderr


@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
@pytest.mark.parametrize("tokens", [18, 20, 32, 1000, 5003, 9496, 151_936])
def test_a_thread_adds_as_many_neighbours_as_in_the_engines_kernel(ranks: Ranks, tokens: int, dtype: str) -> None:
    """The reduction order on a GPU depends on how many neighbours a thread holds."""
    [(trainers, engines)] = ranks.run(1, both_neighbours, tokens, dtype)
    assert trainers == engines == [min(4, tokens & -tokens)]


def both_neighbours(tokens: int, dtype: str) -> tuple[list[int], list[int]]:
    from sglang.srt.batch_invariant_ops.batch_invariant_ops import _log_softmax_kernel

    sizes = {"stride": tokens, "columns": tokens, "BLOCK": softmax_kernel.BLOCK, "WIDE": softmax_kernel.WIDE}
    types = {"logits": dtype, "columns": "i32", "temperature": "fp32"}
    strides = dict.fromkeys(("input_row_stride", "output_row_stride", "n_cols"), tokens)
    return (
        neighbours(softmax_kernel._measure, sizes | {"SCALE": False}, types),
        neighbours(_log_softmax_kernel, strides | {"BLOCK_SIZE": softmax_kernel.BLOCK}, {}),
    )


def neighbours(kernel: JITFunction[Any], values: dict[str, Any], types: dict[str, str]) -> list[int]:
    """Return how many neighbours a thread holds in each sum of a block in a compiled kernel, read from its code.
    Arguments that have no type point to fp32."""
    fixed = {parameter.name: values[parameter.name] for parameter in kernel.params if parameter.is_constexpr}
    signature = {name: "constexpr" if name in fixed else types.get(name, "*fp32") for name in kernel.arg_names}
    aligned: Any = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=aligned)
    code = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": softmax_kernel.WARPS}).asm["ttgir"]
    held = dict(re.findall(r"(#blocked\d*) = #ttg.blocked<\{sizePerThread = \[(\d+)\]", code))
    reshaped = dict(re.findall(r"%(\w+) = tt.reshape %\w+ allow_reorder : tensor<\d+xf32, (#blocked\d*)>", code))
    summed = re.findall(r'"tt.reduce"\(%(\w+)\) <\{axis = 0 : i32\}> \(\{[^}]*?arith.addf', code)
    return [int(held[reshaped[name]]) for name in summed if name in reshaped]
