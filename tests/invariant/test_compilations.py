"""How many kernels Triton compiles for the batches of a rollout: the keys under which it keeps them are computed from
real launches, for a GPU that need not be there."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from miles_spmd.invariant import expert_kernels, kernels, split_attention
from miles_spmd.training import softmax_kernel

BATCHES = range(1, 257)
GPU = GPUTarget("cuda", 90, 32)
BF16 = torch.bfloat16

Keys = dict[str, set[str]]  # by kernel


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Keys:
    """What launches would compile: nothing is launched."""
    keys: Keys = defaultdict(set)
    backend: Any = make_backend(GPU)

    def run(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, rest = binder(*args, **options)
        keys[kernel.__name__].add(compute_cache_key({}, specialization, rest))

    monkeypatch.setattr(JITFunction, "run", run)
    return keys


class OnGpu(torch.Tensor):
    """A tensor that says so, for functions that have another formula for CPUs."""

    is_cuda = True  # type: ignore[assignment]


def norm(batch: int) -> None:
    kernels.rms_norm(torch.empty(batch, 1024, dtype=BF16), torch.empty(1024, dtype=BF16), 1e-6, None)


def norm_backward(batch: int) -> None:
    x = torch.empty(batch, 1024, dtype=BF16)
    kernels.rms_norm_backward(x, x, torch.empty(1024, dtype=BF16), torch.empty(batch))


def rotation(batch: int) -> None:
    qkv, table = torch.empty(batch, 32, 128, dtype=BF16), torch.empty(4096, 128)
    kernels.rotate(qkv[:, :16], table, torch.zeros(batch, dtype=torch.int64))


def activation(batch: int) -> None:
    kernels.swiglu(torch.empty(batch, 6144, dtype=BF16))


def attention(batch: int) -> None:
    cache = torch.empty(4096, 1, 128, dtype=BF16)
    lengths, slot_at = torch.empty(2, batch, dtype=torch.int64).unbind()
    slots = torch.empty(4096, dtype=torch.int32)
    held = split_attention.Keys(cache, cache, lengths.clone(), slots, slot_at.clone())
    split_attention.decode(torch.empty(batch, 2, 128, dtype=BF16), held, 1024, 0.1, 1024)  # 2 heads: tensor parallel
    starts = torch.empty(batch + 1, dtype=torch.int32)
    split_attention.attend(torch.empty(batch, 2, 128, dtype=BF16), held, starts, 1, 0.1, 1024)


def softmax(batch: int) -> None:
    logits = torch.empty(batch, 1024, dtype=BF16)
    peak, total, _ = softmax_kernel.measure(logits, 1.0)
    rows = slice(batch // 2, None)  # what is left of a chunk
    column = torch.zeros(batch, 1, dtype=torch.int64)
    total = total[:, None]
    grad = torch.empty(batch, 1)
    softmax_kernel.differentiate(logits[rows], 1.0, peak[rows], total[rows], column[rows], grad[rows])


def experts(batch: int) -> None:
    chosen = torch.zeros(batch, 3, dtype=torch.int64).as_subclass(OnGpu)
    expert_kernels.arrange(chosen, torch.empty(batch, 3), 8)
    expert_kernels.top_k(torch.empty(batch, 8).as_subclass(OnGpu), 3)
    expert_kernels.gather_sum(torch.empty(3 * batch, 512, dtype=BF16).as_subclass(OnGpu), chosen)


LAUNCHES: dict[Callable[[int], None], int] = {  # and the number of kernels that each launches
    norm: 1,
    norm_backward: 1,
    rotation: 1,
    activation: 1,
    attention: 3,
    softmax: 2,
    experts: 3,
}


@pytest.mark.parametrize(("launch", "number"), LAUNCHES.items(), ids=[f.__name__ for f in LAUNCHES])
def test_a_kernel_is_compiled_once_for_all_batch_sizes(
    launch: Callable[[int], None], number: int, compiled: Keys
) -> None:
    for batch in BATCHES:
        launch(batch)
    assert {name: len(keys) for name, keys in compiled.items()} == dict.fromkeys(compiled, 1)
    assert len(compiled) == number


def test_one_row_and_multiples_of_sixteen_would_be_compiled_to_the_same_arithmetic() -> None:
    """Why the bits of the norm do not depend on the number of rows being left open."""
    fixed = {"WIDTH": 128, "BLOCK": 128, "ROWS": 16, "ADD": False}
    types = {"x": "*bf16", "residual": "*bf16", "weight": "*bf16", "y": "*bf16", "total": "*bf16", "r": "*fp32"}
    kernel = kernels._rms_norm
    signature = {
        n: "constexpr" if n in fixed else types.get(n, "fp32" if n == "eps" else "i32") for n in kernel.arg_names
    }
    pointers: Any = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    rows = (kernel.arg_names.index("rows"),)
    variants = [
        (signature, fixed, pointers),
        (signature, fixed, pointers | {rows: [["tt.divisibility", 16]]}),
        (signature | {"rows": "constexpr"}, fixed | {"rows": 1}, pointers),
    ]
    found = [arithmetic(ASTSource(kernel, types, constexprs, attributes)) for types, constexprs, attributes in variants]
    assert len(found[0]) > 20
    assert found[0] == found[1] == found[2]


def arithmetic(source: ASTSource) -> list[str]:
    """Return the instructions that compute with fp32, and those that move it between threads, in order."""
    ptx = compile(source, target=GPU, options={"num_warps": 4}).asm["ptx"]
    return re.findall(r"^\s*((?:add|sub|mul|fma|div|sqrt|rsqrt)\.[\w.]*f32|shfl\.[\w.]+)", ptx, re.MULTILINE)
