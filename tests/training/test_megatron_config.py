"""The [megatron] table: every key arrives where it belongs, or is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from miles_spmd.models import load_family
from miles_spmd.models.rope import Rope
from miles_spmd.training.megatron_config import (
    MegatronConfig,
    _refuse_unsupported_blocks,
    build_megatron_config,
)
from miles_spmd.training.optimizer import build_schedule, planned_updates
from tests.models import tiny
from tests.training.cases import config


def built(table: dict, name: str = "qwen3", dtype: str = "float32", **tables: dict) -> MegatronConfig:
    run = config(name, table, model={"dtype": dtype}, **tables)
    return build_megatron_config(run, load_family(run.model.hf_checkpoint))


def test_keys_arrive_in_every_dataclass_that_knows_them() -> None:
    ours = built(
        {"use_distributed_optimizer": True, "lr": 3e-4, "adam_beta2": 0.98, "recompute_granularity": "selective"},
        train={"min_lr": 1e-5},
    )
    assert ours.optimizer.use_distributed_optimizer
    assert ours.ddp.use_distributed_optimizer
    assert (ours.optimizer.lr, ours.optimizer.min_lr, ours.optimizer.adam_beta2) == (3e-4, 1e-5, 0.98)
    assert ours.transformer.recompute_granularity == "selective"


def test_the_user_overrules_our_defaults() -> None:
    assert built({}).ddp.grad_reduce_in_fp32
    assert not built({"grad_reduce_in_fp32": False}).ddp.grad_reduce_in_fp32
    assert built({"bias_dropout_fusion": True}).transformer.bias_dropout_fusion


def test_attention_takes_keys_as_an_engine_does() -> None:
    def parts(**sglang: object) -> int:
        parity = {"determinism": {"parity": "bitwise"}, "sglang": sglang}
        return built({}, dtype="bfloat16", **parity).transformer.split_keys

    assert parts() == parts(attention_backend="fa3") == 0
    assert parts(attention_backend="triton") == 1024
    assert parts(attention_backend="triton", context_length=40960) == 8192


def test_model_and_dtype() -> None:
    transformer = built({}, "qwen3_moe", "bfloat16").transformer
    assert (transformer.num_layers, transformer.num_moe_experts, transformer.moe_ffn_hidden_size) == (4, 4, 24)
    assert (transformer.params_dtype, transformer.bf16) == (torch.bfloat16, True)
    assert transformer.activation_func is torch.nn.functional.silu


def test_layers_per_virtual_stage() -> None:
    table = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
    assert built(table).transformer.virtual_pipeline_model_parallel_size == 2
    with pytest.raises(ValueError, match="= 3 does not divide the 4 layers over 2 stages"):
        built(table | {"num_layers_per_virtual_pipeline_stage": 3})


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="moe_aux_loss_coeff must be 0"):
        built({"moe_aux_loss_coeff": 0.01}, "qwen3_moe")
    with pytest.raises(ValueError, match="layernorm cannot be recomputed without Transformer Engine"):
        built({"recompute_granularity": "selective", "recompute_modules": ["layernorm"]})
    with pytest.raises(ValueError, match="leave them out: moe_expert_capacity_factor, moe_token_dispatcher_type"):
        built({"moe_expert_capacity_factor": 1.0, "moe_token_dispatcher_type": "flex"}, "qwen3_moe")
    with pytest.raises(ValueError, match="use_precision_aware_optimizer must be false"):
        built({"use_precision_aware_optimizer": True})


def test_transformer_engine_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert built({}).transformer.transformer_impl == "local"
    assert built({}).token_multiple == 1
    engine = {"transformer_impl": "transformer_engine"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU"):
        built(engine)


@pytest.mark.parametrize(
    ("tables", "updates"),
    [
        ({"run": {"mode": "sft", "num_rollout": 7}}, 7),
        ({"run": {"num_rollout": 7}}, 7),
        (
            {
                "run": {"num_rollout": 7},
                "rollout": {"rollout_batch_size": 5, "n_samples_per_prompt": 4},
                "train": {"global_batch_size": 8},
            },
            21,  # 20 samples in steps of 8, 8 and 4
        ),
    ],
)
def test_planned_updates(tables: dict, updates: int) -> None:
    assert planned_updates(config("qwen3", **tables)) == updates


@pytest.mark.parametrize(("warm_up", "rates"), [(0, [0.6, 0.6, 0.6]), (1, [0.3, 0.6, 0.6]), (2, [0.2, 0.4, 0.6])])
def test_the_first_update_of_a_warm_up_has_a_learning_rate(warm_up: int, rates: list[float]) -> None:
    run = config("qwen3", {"lr": 0.6}, run={"mode": "sft", "num_rollout": 5}, train={"lr_warmup_iters": warm_up})
    megatron = build_megatron_config(run, load_family(run.model.hf_checkpoint))
    parameters = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    parameters.param_groups[0] |= {"wd_mult": 1.0}
    schedule = build_schedule(run, megatron, parameters)
    found = []
    for _ in rates:
        found.append(parameters.param_groups[0]["lr"])
        schedule.step(1)
    assert found == pytest.approx(rates)


@pytest.mark.parametrize(
    "rope", [Rope(1e4, 8, interleaved=True), Rope(1e4, 4), Rope(1e4, 8, "yarn", attention_factor=1.1)]
)
def test_rotary_positions_that_transformer_engine_has_not(rope: Rope) -> None:
    family = load_family(tiny.build("llama").config.to_dict())
    layers = [replace(layer, attention=replace(layer.attention, rope=None)) for layer in family.layers[:3]]
    layers[1:] = (replace(layers[0], attention=replace(layers[0].attention, rope=r)) for r in (Rope(1e4, 8), rope))
    table = {"transformer_impl": "transformer_engine"}
    _refuse_unsupported_blocks(table, layers[:2])
    _refuse_unsupported_blocks(table | {"context_parallel_size": 2}, layers)  # whose attention is our own
    _refuse_unsupported_blocks(table | {"transformer_impl": "local"}, layers)
    with pytest.raises(ValueError, match=r"layer 2 of this model has rotary positions.*set 'local'"):
        _refuse_unsupported_blocks(table, layers)


@pytest.mark.parametrize("name", [name for name in tiny.CONFIGS if name not in (*tiny.BY_HAND, "mixtral", "phi3")])
def test_what_transformer_engine_has_not(name: str) -> None:
    """Mixtral and Phi-3 without a window have what a plain decoder has."""
    layers = load_family(tiny.build(name).config.to_dict()).layers
    with pytest.raises(ValueError, match="which Transformer Engine's layers do not; set 'local'"):
        _refuse_unsupported_blocks({"transformer_impl": "transformer_engine"}, layers)
