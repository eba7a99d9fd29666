"""Engine and trainer on a CPU: the log-probs of decoded tokens are the same bits on both sides, whatever the layout and
the packing, while weights change."""

from __future__ import annotations

from typing import Any

import pytest

from tests.invariant.side_by_side import PROMPTS, SAMPLES, train_and_compare
from tests.ranks import Ranks
from tests.training.cases import PP2, TP2, config

STEPS, PROMPT, ANSWER = 20, 5, 12
LR = {"lr": 3e-3, "clip_grad": 1.0}


def compare(
    ranks: Ranks,
    name: str,
    world_size: int,
    megatron: dict[str, Any],
    *,
    temperature: float = 1.0,
    micro_batches: int = 3,
) -> None:
    tables = {
        "rollout": {"rollout_temperature": temperature},
        "determinism": {"parity": "bitwise"},
        "sglang": {"context_length": 64, "tp_size": megatron.get("tensor_model_parallel_size", 1)},
    }
    run = config(name, LR | megatron, **tables)
    found = ranks.run(world_size, train_and_compare, run, STEPS, PROMPT, ANSWER, micro_batches)
    tokens = sum(ANSWER * (SAMPLES + s) // SAMPLES for s in range(SAMPLES)) * PROMPTS * STEPS
    replicas = max(1, world_size // (2 if megatron else 1))
    assert sum(of_rank.tokens for of_rank in found) == tokens
        world_size // replicas if TP2.items() <= megatron.items() else 1
    )
    assert all(norm > 0 for norm in found[0].grad_norms)
    assert [of_rank.mismatches for of_rank in found] == [0] * world_size
    assert [of_rank.largest for of_rank in found] == [0.0] * world_size


@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied", "qwen2", "llama"])
def test_every_family(ranks: Ranks, name: str) -> None:
    compare(ranks, name, 1, {})
