"""Engine and trainer on a CPU: the log-probs of decoded tokens are bitwise equal on both sides, whatever the layout and
the packing, while weights change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from miles_spmd.config import Config
from tests.invariant.side_by_side import PROMPTS, SAMPLES, checkpoint, train_and_compare
from tests.ranks import Ranks
from tests.training.cases import EP2, ETP1, PP2, SP, TP2

TP4 = {"tensor_model_parallel_size": 4}
STEPS, PROMPT, RESPONSE = 20, 5, 12
DECODED = sum(RESPONSE * (SAMPLES + s) // SAMPLES for s in range(SAMPLES)) * PROMPTS  # tokens of one step
UPDATES = {"lr": 3e-3, "clip_grad": 1.0}


def compare(
    ranks: Ranks,
    folder: Path,
    name: str,
    world_size: int = 1,
    megatron: dict[str, Any] | None = None,
    steps: int = STEPS,
    temperature: float = 1.0,
    micro_batches: int = 3,
    engine_tp: int | None = None,
    experts_on: int = 1,
    **shape: int,
) -> None:
    """Assert that no log-prob differs. The engine's tensor-parallel size is the trainer's, unless ``engine_tp`` is
    given."""
    tp = (megatron or {}).get("tensor_model_parallel_size", 1)
    run = Config(
        model={"hf_checkpoint": checkpoint(folder, name, **shape), "dtype": "float32"},
        data={"prompt_data": "none"},
        megatron=UPDATES | (megatron or {}),
        rollout={"rollout_temperature": temperature},
        determinism={"parity": "bitwise"},
        sglang={"context_length": 64, "tp_size": engine_tp or tp, "ep_size": experts_on},
    )
    found = ranks.run(world_size, train_and_compare, run, steps, PROMPT, RESPONSE, micro_batches)
    scored = sum(of_rank.tokens for of_rank in found)
    assert scored == steps * DECODED
    assert all(norm > 0 for norm in found[0].grad_norms)
    assert [(of_rank.mismatches, of_rank.largest) for of_rank in found] == [(0, 0.0)] * world_size


@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied", "qwen2", "llama", "qwen3_moe"])
def test_families(ranks: Ranks, tmp_path: Path, name: str) -> None:
    compare(ranks, tmp_path, name)


NEW = ["mistral", "mixtral", "phi3", "gemma2", "gemma3_text", "olmo2", "glm4", "qwen2_moe", "glm4_moe"]


@pytest.mark.slow
@pytest.mark.parametrize("engine_ranks", [1, 2])
@pytest.mark.parametrize("name", NEW)
def test_families_whose_layouts_differ(ranks: Ranks, tmp_path: Path, name: str, engine_ranks: int) -> None:
    """Two tensor-parallel ranks of the trainer with an engine on each, or two trainers with one engine."""
    moe = name in ("mixtral", "qwen2_moe", "glm4_moe")
    split = (TP2 | SP | EP2 | ETP1 if moe else TP2) if engine_ranks == 1 else {}
    experts_on = engine_ranks if moe else 1
    engine = {"engine_tp": engine_ranks, "experts_on": experts_on, "num_key_value_heads": 4}
    compare(ranks, tmp_path, name, 2, split, steps=5, **engine)


@pytest.mark.parametrize("layout", [{}, PP2, TP2, TP2 | SP], ids=["DP2", "PP2", "TP2", "TP2+SP"])
def test_layouts(ranks: Ranks, tmp_path: Path, layout: dict[str, Any]) -> None:
    compare(ranks, tmp_path, "qwen3", 2, layout, steps=5)


@pytest.mark.parametrize(
    ("layout", "engine_tp", "world_size"),
    [
        (TP2, 1, 2),
        ({}, 2, 2),
        pytest.param(TP4, 2, 4, marks=pytest.mark.slow),
        pytest.param(TP4 | SP, 1, 4, marks=pytest.mark.slow),
        (TP2, 4, 4),
    ],
    ids=["TP2-1", "TP1-2", "TP4-2", "TP4+SP-1", "TP2-4"],
)
def test_layers_shared_by_more_or_fewer_ranks(
    ranks: Ranks, tmp_path: Path, layout: dict[str, Any], engine_tp: int, world_size: int
) -> None:
    """With as many key-value heads as ranks: with fewer, SGLang on a CPU would pad the model with heads of its own."""
    compare(ranks, tmp_path, "qwen3", world_size, layout, steps=5, engine_tp=engine_tp, num_key_value_heads=4)


@pytest.mark.parametrize(
    ("layout", "engine_ranks", "world_size"),
    [(EP2, 1, 2), ({}, 2, 2), (TP2 | SP | EP2 | ETP1, 2, 2), (EP2, 4, 4)],
    ids=["EP2-1", "DP2-2", "TP2+SP+EP2-2", "EP2-4"],
)
def test_experts_shared_by_more_or_fewer_ranks(
    ranks: Ranks, tmp_path: Path, layout: dict[str, Any], engine_ranks: int, world_size: int
) -> None:
    engine = {"engine_tp": engine_ranks, "experts_on": engine_ranks, "num_key_value_heads": 4}
    compare(ranks, tmp_path, "qwen3_moe", world_size, layout, steps=5, **engine)


@pytest.mark.parametrize("micro_batches", [1, 24])
def test_packings_and_temperature(ranks: Ranks, tmp_path: Path, micro_batches: int) -> None:
    compare(ranks, tmp_path, "qwen3", steps=5, temperature=0.7, micro_batches=micro_batches)
