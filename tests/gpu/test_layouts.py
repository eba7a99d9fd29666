"""A refit between layouts on GPUs, through NCCL: bit for bit what SGLang's own loader makes of the checkpoint."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import pytest

from tests.gpu.machine import ENGINE, needs
from tests.models import tiny
from tests.ranks import Ranks
from tests.weights.test_refit import written_over
from tests.weights.test_trainer_to_engine import EP, PP, TP, VPP, refit_and_compare


@pytest.mark.parametrize(
    ("world", "name", "megatron", "engine_tp", "dtype"),
    [
        pytest.param(1, "qwen3-tied", {}, 1, "bfloat16", marks=needs(1)),
        pytest.param(2, "qwen3", {TP: 2, "sequence_parallel": True}, 2, "bfloat16", marks=needs(2)),
        pytest.param(2, "qwen3-tied", {TP: 2}, 1, "float32", marks=needs(2)),
        pytest.param(2, "qwen3", {"use_distributed_optimizer": True}, 2, "bfloat16", marks=needs(2)),
        pytest.param(2, "qwen3-tied", {PP: 2}, 2, "float32", marks=needs(2)),
        pytest.param(4, "qwen3", {TP: 2, PP: 2}, 4, "bfloat16", marks=needs(4)),
        pytest.param(4, "qwen3-tied", {TP: 2, **VPP}, 1, "bfloat16", marks=needs(4)),
        pytest.param(4, "qwen2", {TP: 2, "sequence_parallel": True}, 2, "bfloat16", marks=needs(4)),
        pytest.param(4, "llama", {"use_distributed_optimizer": True}, 4, "bfloat16", marks=needs(4)),
    ],
)
def test_refit(ranks: Ranks, world: int, name: str, megatron: dict[str, Any], engine_tp: int, dtype: str) -> None:
    server_args = ENGINE | {"tp_size": engine_tp, "disable_cuda_graph": True}  # nothing is generated
    ranks.run(world, refit_and_compare, tiny.checkpoint(name), megatron, server_args, dtype)


@needs(2)
def test_refit_without_access_to_peers(ranks: Ranks) -> None:
    server_args = ENGINE | {"cuda_graph_bs_decode": [1]}
    said, _ = ranks.run(2, refit_through_buffers, tiny.checkpoint("qwen3-tied"), {TP: 2}, server_args, "bfloat16")
    assert re.search(r"weights go through buffers and NCCL, because memory of rank [01] .*: no access", said)


def refit_through_buffers(*arguments: Any) -> str:
    """As where one GPU cannot map another's memory. Returns what is said of it."""
    from miles_spmd.weights import cuda_ipc

    def refuse(_: cuda_ipc.Export) -> int:
        raise cuda_ipc.MappingError("no access")

    original, cuda_ipc.address = cuda_ipc.address, refuse
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            refit_and_compare(*arguments)
    finally:
        cuda_ipc.address = original
    return said.getvalue()


@needs(1)
def test_a_write_that_does_not_last_is_detected(ranks: Ranks) -> None:
    (message,) = ranks.run(1, written_over, "cuda")
    assert "one or more of a, b" in message


@needs(2)
def test_refit_of_experts(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, changes = tiny.CONFIGS["qwen3_moe"]  # smaller heads and experts than SGLang's kernels take
    larger = (kind, changes | {"head_dim": 64, "moe_intermediate_size": 64})
    monkeypatch.setitem(tiny.CONFIGS, "qwen3_moe-larger", larger)
    server_args = ENGINE | {"cuda_graph_bs_decode": [1]}
    ranks.run(2, refit_and_compare, tiny.checkpoint("qwen3_moe-larger"), {EP: 2}, server_args, "bfloat16")
