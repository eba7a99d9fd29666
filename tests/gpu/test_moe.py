"""Mixtures of experts on GPUs: refits between layouts bit for bit, and a GRPO run that learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from miles_spmd.quickstart import checkpoint
from miles_spmd.quickstart.__main__ import SFT
from miles_spmd.quickstart.assets import build_assets
from tests.gpu.machine import needs
from tests.gpu.test_grpo import learns, train
from tests.models import tiny
from tests.ranks import Ranks
from tests.weights.test_trainer_to_engine import EP, PP, TP, refit_and_compare

SP = {"sequence_parallel": True}
ETP1 = {"expert_tensor_parallel_size": 1}
# Smaller heads and experts SGLang's kernels do not take.
SHAPES = {
    "small": {"head_dim": 64, "moe_intermediate_size": 64},
    "large": {
        "head_dim": 128,
        "hidden_size": 512,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 256,
        "vocab_size": 5003,
    },
}


@pytest.mark.parametrize(
    ("world", "shape", "megatron", "engine"),
    [
        pytest.param(1, "large", {}, {}, marks=needs(1)),
        pytest.param(2, "small", {EP: 2}, {}, marks=needs(2)),
        pytest.param(2, "large", {EP: 2}, {"tp_size": 2}, marks=needs(2)),
        pytest.param(2, "large", {TP: 2, **SP}, {"tp_size": 2, "ep_size": 2}, marks=needs(2)),
        pytest.param(2, "small", {PP: 2}, {"tp_size": 2}, marks=needs(2)),
        pytest.param(4, "large", {TP: 2, EP: 4, **SP, **ETP1}, {"tp_size": 4}, marks=needs(4)),
        pytest.param(4, "large", {EP: 2, PP: 2}, {"tp_size": 4, "ep_size": 4}, marks=needs(4)),
        pytest.param(4, "large", {TP: 2, EP: 2, **SP}, {"tp_size": 2}, marks=needs(4)),
    ],
)
def test_refit(
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    world: int,
    shape: str,
    megatron: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """The oracle is SGLang's own loader."""
    kind, sizes = tiny.CONFIGS["qwen3_moe"]
    monkeypatch.setitem(tiny.CONFIGS, f"qwen3_moe-{shape}", (kind, sizes | SHAPES[shape]))
    server_args = {"mem_fraction_static": 0.3, "disable_cuda_graph": True} | engine  # nothing is generated
    ranks.run(world, refit_and_compare, tiny.checkpoint(f"qwen3_moe-{shape}"), megatron, server_args, "bfloat16")


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``test_grpo.warm``, with eight experts in every layer, of which a token has two."""
    folder = tmp_path_factory.mktemp("experts")
    changes = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 64}
    changes |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "CONFIG", checkpoint.CONFIG | changes)
        build_assets(folder / "assets")
    model, data = f"model.hf_checkpoint={folder}/assets/model", f"data.prompt_data={folder}/assets/sft.jsonl"
    train(SFT, folder, "sft", 1, model, data)
    return folder


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(1, [], marks=needs(1)),
        pytest.param(2, [f"megatron.{EP}=2", "sglang.tp_size=2", "sglang.ep_size=2"], marks=needs(2)),
        pytest.param(2, [f"megatron.{EP}=2", "megatron.use_distributed_optimizer=true"], marks=needs(2)),
    ],
)
def test_grpo_learns(warm: Path, ranks: int, layout: list[str]) -> None:
    learns(warm, ranks, "bfloat16", layout)
