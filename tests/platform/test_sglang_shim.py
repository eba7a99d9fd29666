"""What lets SGLang be imported on a CPU, and when it says no."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
import torch

from miles_spmd.platform.cpu import sgl_kernel_stub, sglang_shim


def test_transformers_may_come_first() -> None:
    """The other order is that of every other test."""
    program = """
import transformers.models.qwen3.modeling_qwen3
from miles_spmd.platform.cpu import sglang_shim
sglang_shim.install()
sglang_shim.install()
import sglang.srt.managers.scheduler
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM
import sgl_kernel
assert sgl_kernel.__name__.endswith("sgl_kernel_stub")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_version_of_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sgl_kernel", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.9")
    with pytest.raises(RuntimeError, match=r"sglang 0\.5\.16 is required, found 0\.9\.9"):
        sglang_shim.install()


def test_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sgl_kernel", raising=False)
    monkeypatch.setitem(sys.modules, "sglang.srt", sys)
    with pytest.raises(RuntimeError, match="sglang was imported before"):
        sglang_shim.install()


def test_missing_kernels_say_so() -> None:
    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.moe_align_block_size has no CPU implementation"):
        sgl_kernel_stub.moe_align_block_size(1, 2)


def test_cache_slots_are_assigned() -> None:
    table = torch.zeros(6, 10, dtype=torch.int32)
    rows, start, end = torch.tensor([4, 0, 2]), torch.tensor([2, 0, 9]), torch.tensor([5, 4, 9])
    slots = torch.arange(100, 107)
    expected, taken = table.clone(), 0
    for row, first, last in zip(rows.tolist(), start.tolist(), end.tolist()):
        for column in range(first, last):
            expected[row, column] = slots[taken]
            taken += 1
    sgl_kernel_stub.assign_req_to_token_pool_cpu(rows, table, start, end, slots)
    assert torch.equal(table, expected)
