"""Tiny checkpoints of every family, written by transformers itself."""

from __future__ import annotations

import atexit
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from miles_spmd.platform import cpu

cpu.install()

import torch  # noqa: E402
import transformers  # noqa: E402

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,  # odd: every tensor-parallel size needs padding
    "initializer_range": 0.1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "llama": ("Llama", {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 16384}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
}
BY_HAND = [*CONFIGS]  # whose layouts tests.models.parallel has written down by hand
GEMMA = {"head_dim": 16, "pad_token_id": None, "query_pre_attn_scalar": 24, "sliding_window": 7}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}  # which these small models feel
CONFIGS |= {
    "mistral": ("Mistral", {"sliding_window": 9}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("Phi3", {"pad_token_id": None}),
    "gemma2": ("Gemma2", GEMMA | CAPS),
    "gemma3_text": ("Gemma3", GEMMA | {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}),
    "olmo2": ("Olmo2", {}),
    "glm4": ("Glm4", {"head_dim": 16, "pad_token_id": None}),
}
CONFIGS |= {
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            "first_k_dense_replace": 1,
            "head_dim": 16,
            "moe_intermediate_size": 24,
            "n_group": 2,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "pad_token_id": None,
            "routed_scaling_factor": 2.5,
            "topk_group": 1,
            "use_qk_norm": True,
        },
    ),
}
CONFIG_CLASSES = {"Gemma3": "Gemma3TextConfig"}


def build(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> transformers.PreTrainedModel:
    """A random model of one of CONFIGS, with ``more`` settings; norms and biases are not left at their ones and
    zeros."""
    torch.manual_seed(0)
    model = new(name, **more)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.add_(0.1 * torch.randn_like(buffer))
    return model.to(dtype).eval()


def new(name: str, **more: Any) -> transformers.PreTrainedModel:
    """A model of one of CONFIGS, with ``more`` settings and transformers' own random weights."""
    prefix, changes = CONFIGS[name]
    config = getattr(transformers, CONFIG_CLASSES.get(prefix, f"{prefix}Config"))(**(COMMON | changes | more))
    config._attn_implementation = "eager"  # the others ignore a soft-cap
    return getattr(transformers, f"{prefix}ForCausalLM")(config)


def build_classifier(name: str) -> transformers.PreTrainedModel:
    """The backbone of :func:`build` with a random head of one label."""
    prefix, _ = CONFIGS[name]
    config = build(name).config
    config.num_labels = 1
    model = getattr(transformers, f"{prefix}ForSequenceClassification")(config)
    model.model.load_state_dict(build(name).model.state_dict())
    return model.eval()


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> transformers.PreTrainedModel:
    model = build(name, dtype)
    model.save_pretrained(folder, **options)
    return model


@cache
def wide(name: str) -> Path:
    """As :func:`checkpoint`, with MLP widths that an engine of two ranks on a CPU does not round up."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    names = {"intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"} & {
        *COMMON,
        *CONFIGS[name][1],
    }
    build(name, **dict.fromkeys(names, 64)).save_pretrained(folder.name)
    return Path(folder.name)


@cache
def checkpoint(name: str) -> Path:
    """The folder of one of CONFIGS in fp32, written once per test process."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    save(Path(folder.name), name)
    return Path(folder.name)
