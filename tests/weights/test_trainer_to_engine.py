"""A real Megatron trainer refits a real SGLang engine; the oracle is SGLang's own loader on the same checkpoint."""

from __future__ import annotations

from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from miles_spmd.config import Config
from miles_spmd.models import load_family
from miles_spmd.weights.refit import Refit
from tests.models import tiny
from tests.ranks import Ranks


def refit_and_compare(
    folder: Path, megatron: dict[str, Any], server_args: dict[str, Any], dtype: str, rollout_num_gpus: int = 0
) -> None:
    from miles_spmd.algorithms.losses import make_loss
    from miles_spmd.generation.sglang.engine import SglangEngine
    from miles_spmd.training.trainer import Trainer
    from miles_spmd.worker.world import take_side

    table = {"model": {"hf_checkpoint": folder, "dtype": dtype}, "data": {"prompt_data": "none"}, "megatron": megatron}
    config = Config.model_validate(table)
    side = take_side(rollout_num_gpus, timedelta(minutes=2))
    weights, layout, engine_weights, engine_layout = {}, [], {}, []
    with ExitStack() as stack:
        if side.trains:
            trainer = Trainer(config, load_family(folder), make_loss("rl", config.algorithm))
            weights, layout = trainer.weights(), trainer.layout()
        if side.generates:
            engine = stack.enter_context(closing(SglangEngine(folder, dtype=dtype, server_args=server_args)))
            engine_weights, engine_layout = engine.weights(), engine.layout()
        refit = Refit(weights, layout, engine_weights, engine_layout, bucket_bytes=10_000, group=side.everyone)
        state = load_file(folder / "model.safetensors")
        for factor in (1.0, 0.5):  # the second time after an update, and after the engine gave its memory back
            for tensor in weights.values():
                tensor.mul_(factor)
            if side.trains and side.generates:
                engine.release()
                engine.resume()
            refit.run()
            if side.generates:
                refitted = {name: tensor.clone() for name, tensor in engine_weights.items()}
                engine._model.load_weights((name, tensor * factor) for name, tensor in state.items())
            for name, tensor in engine_weights.items():
                assert torch.equal(refitted[name], tensor), name


TP, PP, EP, CP = (f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "expert_model", "context"))
VPP = {PP: 2, "virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("world", "name", "megatron", "engine_tp"),
    [
        (1, "qwen3", {}, 1),
        (2, "qwen2", {}, 2),
        (2, "qwen2", {TP: 2, "sequence_parallel": True}, 1),
        (2, "llama", {TP: 2}, 2),
        (2, "qwen3-tied", {PP: 2}, 2),
        (2, "qwen3-tied", VPP, 1),
        (2, "qwen3", {CP: 2}, 2),
        (2, "qwen3_moe", {EP: 2}, 1),
        (2, "qwen3_moe", {TP: 2, "sequence_parallel": True}, 2),
        (4, "qwen3", {TP: 2, PP: 2}, 2),
        (4, "qwen3-tied", {TP: 2, **VPP}, 1),
        (4, "qwen3_moe", {TP: 2, EP: 4, "expert_tensor_parallel_size": 1, "sequence_parallel": True}, 2),
    ],
)
def test_any_trainer_layout_to_any_engine(
    ranks: Ranks, world: int, name: str, megatron: dict[str, Any], engine_tp: int
) -> None:
    dtype = "bfloat16" if "moe" in name or name == "qwen2" else "float32"
    ranks.run(world, refit_and_compare, tiny.checkpoint(name), megatron, {"tp_size": engine_tp}, dtype)


@pytest.mark.parametrize(
    ("trainers", "name", "megatron", "engines", "engine_tp"),
    [
        (1, "qwen3-tied", {}, 1, 1),
        (1, "qwen3", {}, 2, 1),
        (1, "qwen2", {}, 2, 2),
        (2, "qwen3", {TP: 2, "sequence_parallel": True}, 1, 1),
        (2, "qwen3_moe", {EP: 2}, 2, 2),
        (2, "qwen3-tied", {PP: 2}, 2, 1),
    ],
)
def test_trainers_to_engines_of_other_ranks(
    ranks: Ranks, trainers: int, name: str, megatron: dict[str, Any], engines: int, engine_tp: int
) -> None:
    dtype = "bfloat16" if "moe" in name or name == "qwen2" else "float32"
    arguments = tiny.checkpoint(name), megatron, {"tp_size": engine_tp}, dtype, engines
    ranks.run(trainers + engines, refit_and_compare, *arguments)


@pytest.mark.parametrize("megatron", [{}, {EP: 2}, {TP: 2, "sequence_parallel": True}], ids=["DP2", "EP2", "TP2"])
def test_an_engine_of_whole_experts(ranks: Ranks, megatron: dict[str, Any]) -> None:
    server_args = {"tp_size": 2, "ep_size": 2}
    ranks.run(2, refit_and_compare, tiny.checkpoint("qwen3_moe"), megatron, server_args, "bfloat16")
