from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from miles_spmd.models import load_family
from miles_spmd.models.random import SHAPES
from tests.models import tiny
from tests.models.published import LLAMA, QWEN2, QWEN3, QWEN3_MOE


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_tensor_map_is_what_transformers_writes(name: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    model = tiny.save(tmp_path, name)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    family = load_family(tmp_path)
    assert family.checkpoint_tensors() == written
    biases = [b for name, b in model.named_buffers() if name.endswith("bias")]  # of routers
    assert family.num_parameters() == sum(p.numel() for p in (*model.parameters(), *biases))


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [  # as counted on the models' Hugging Face pages
        (QWEN3, 596_049_920, 596_049_920),
        (QWEN2, 7_615_616_512, 7_615_616_512),
        (LLAMA, 8_030_261_248, 8_030_261_248),
        (QWEN3_MOE, 30_532_122_624, 3_353_032_704),
        (SHAPES["mistral-7b"], 7_241_732_096, 7_241_732_096),
        (SHAPES["mixtral-8x7b"], 46_702_792_704, 12_879_925_248),
        (SHAPES["gemma-2-2b"], 2_614_341_888, 2_614_341_888),
        (SHAPES["gemma-3-1b"], 999_885_952, 999_885_952),
        (SHAPES["phi-4-mini"], 3_836_021_760, 3_836_021_760),
        (SHAPES["olmo-2-7b"], 7_298_617_344, 7_298_617_344),
        (SHAPES["glm-4-9b"], 9_400_279_040, 9_400_279_040),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_published_sizes(config: dict, total: int, active: int) -> None:
    family = load_family(config)
    assert (family.num_parameters(), family.num_active_parameters()) == (total, active)


def test_flops_count_the_keys_that_are_seen() -> None:
    """Of Gemma 3, whose windows are 512 tokens in five layers of six; written out over the queries of a sequence."""
    shape, tokens = SHAPES["gemma-3-1b"], 3000
    seen = np.arange(1, tokens + 1)
    full = sum(number % 6 == 5 for number in range(26))
    pairs = full * seen.sum() + (26 - full) * np.minimum(seen, 512).sum()
    expected = 6 * 999_885_952 * tokens + 3 * 4 * pairs * 4 * 256  # three times two products of 2 FLOPs a number
    assert load_family(shape).flops(tokens) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", tiny.BY_HAND)
def test_megatron_arguments_agree_with_the_transformers_config(name: str) -> None:
    config = tiny.build(name).config
    family = load_family(json.loads(config.to_json_string()))
    model = family.gpt_model(tp_size=4)
    assert family.rope(0).theta == config.rope_parameters["rope_theta"]
    assert family.rope(0).kind == ("llama3" if name == "llama" else "default")
    assert model["share_embeddings_and_output_weights"] == config.tie_word_embeddings
    assert model["vocab_size"] == 100
    assert family.gpt_model()["vocab_size"] == 97
    transformer = family.transformer_config()
    assert transformer["qk_layernorm"] == name.startswith("qwen3")
    assert transformer["add_qkv_bias"] == (name == "qwen2")
    assert transformer.get("num_moe_experts") == getattr(config, "num_experts", None)


def test_today_s_and_older_spelling_mean_the_same() -> None:
    older = load_family(LLAMA)
    today = dict(LLAMA) | {"rope_parameters": tiny.LLAMA3_ROPE}
    del today["rope_theta"], today["rope_scaling"]
    assert load_family(today).rope(0) == older.rope(0)
    assert older.rope(0).factor == 8.0
    moe = dict(QWEN3_MOE) | {"num_local_experts": 128}
    del moe["num_experts"]
    assert load_family(moe).transformer_config() == load_family(QWEN3_MOE).transformer_config()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "gpt2"},
            r"supported \(supported: gemma2, .*, qwen3_moe\); docs/models.md says",
        ),
        ({"model_type": "olmo3"}, "'olmo3' is not supported, the nearest is 'olmo2'"),
        (LLAMA | {"logit_scale": 0.5, "residual_multiplier": 2}, "logit_scale, residual_multiplier are not known"),
        ({}, "model_type None is not supported"),
        (QWEN3 | {"head_dim": None}, "head_dim is missing"),
        (QWEN3 | {"rope_scaling": {"rope_type": "proportional"}}, "rope type 'proportional' is not supported"),
        (QWEN3 | {"attention_bias": True}, "attention_bias is not supported"),
        (QWEN2 | {"use_sliding_window": True}, "sliding-window"),
        (QWEN2 | {"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        (QWEN2 | {"quantization_config": {"quant_method": "awq"}}, "quantized"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (LLAMA | {"rope_scaling": tiny.LLAMA3_ROPE | {"high_freq_factor": 1}}, "high_freq_factor must differ"),
        (
            LLAMA | {"rope_scaling": {**tiny.LLAMA3_ROPE, "factor": None}},
            "factor of rope type llama3 must be a positive",
        ),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA | {"rope_theta": float("nan")}, "rope_theta must be a positive number, not nan"),
        (QWEN3 | {"num_attention_heads": "16"}, "num_attention_heads must be a positive integer, not '16'"),
        (QWEN3 | {"vocab_size": 0}, "vocab_size must be a positive integer, not 0"),
        (QWEN3 | {"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, not True"),
        (QWEN3 | {"num_key_value_heads": 3}, "num_attention_heads = 16 is not divisible by num_key_value_heads = 3"),
        (QWEN3 | {"head_dim": 15}, "head_dim = 15 is odd"),
        (QWEN3 | {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, not nan"),
        (QWEN3 | {"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, not 'false'"),
        (LLAMA | {"hidden_size": 4097, "head_dim": None}, "hidden_size = 4097 is not divisible by num_attention_heads"),
        (QWEN3_MOE | {"num_experts_per_tok": 129}, "num_experts_per_tok = 129 is more than num_experts = 128"),
        (QWEN3_MOE | {"num_experts": None}, "num_experts is missing"),
        (QWEN3_MOE | {"mlp_only_layers": [0]}, "dense layers between MoE layers"),
        (QWEN3_MOE | {"decoder_sparse_step": 2}, "dense layers between MoE layers"),
    ],
)
def test_unsupported_models_are_refused(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_family(config)


def test_all_faults_of_a_config_come_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)vocab_size is missing.*mlp_bias.*factor of rope type linear"):
        load_family({"model_type": "llama", "mlp_bias": True, "rope_scaling": {"type": "linear"}})


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_family(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_family(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_family(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=f"{tmp_path}.*hidden_size is missing"):
        load_family(tmp_path)


def test_models_need_no_torch() -> None:
    code = "import sys, miles_spmd.models; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
