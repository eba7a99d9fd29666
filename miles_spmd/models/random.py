"""Checkpoint folders of well-known shapes without weights, for speed runs: ``random:qwen3-4b``.

Speed does not depend on what a model knows. The folder holds a configuration, a tokenizer and, in the place of
gigabytes of safetensors, an empty file that tells ``checkpoint.hf.load`` to make the weights up.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

PREFIX = "random:"
NO_WEIGHTS = "weights.random"

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


# As published, but without end-of-sequence token: every answer is as long as it may be, so that runs can be compared.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _QWEN3 | _sizes(1024, 3072, 28, 16),
    "qwen3-1.7b": _QWEN3 | _sizes(2048, 6144, 28, 16),
    "qwen3-4b": _QWEN3 | _sizes(2560, 9728, 36, 32),
    "qwen3-8b": _QWEN3 | _sizes(4096, 12288, 36, 32) | {"tie_word_embeddings": False},
    "qwen3-30b-a3b": _QWEN3
    | _sizes(2048, 6144, 48, 32)
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "qwen2.5-1.5b": _sizes(1536, 8960, 28, 12)
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "llama-3.2-1b": _sizes(2048, 8192, 16, 32)
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
}

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_checkpoint(name: str, cache: Path | None = None) -> Path:
    """The folder of ``random:SHAPE``, or of ``random:SHAPE/LAYERS`` with that many of its layers only, written below
    ``cache`` (default: the user's cache folder).

    Raises ValueError naming the known shapes, OSError where it cannot be written.
    """
    shape, _, layers = name.removeprefix(PREFIX).partition("/")
    if layers and not re.fullmatch(r"[1-9]\d*", layers):
        raise ValueError(f"{name}: {layers!r} is no number of layers")
    if shape not in SHAPES:
        near = difflib.get_close_matches(shape, SHAPES, n=1)
        hint = f", did you mean {PREFIX}{near[0]}?" if near else ""
        raise ValueError(f"{name}: no such shape{hint} (there are {', '.join(SHAPES)})")
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miles-spmd" / "random"
    config = SHAPES[shape] | ({"num_hidden_layers": int(layers)} if layers else {})
    folder = cache / (f"{shape}-{layers}" if layers else shape)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": _SPECIAL[0], "eos_token": _SPECIAL[2]}
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "dtype": "bfloat16"}
    files = {
        "config.json": json.dumps(config | no_tokens, indent=2),
        "tokenizer.json": _byte_tokenizer(),
        "tokenizer_config.json": json.dumps(tokenizer, indent=2),
        "chat_template.jinja": _CHAT_TEMPLATE,
        NO_WEIGHTS: "",
    }
    for file, text in files.items():
        _replace(folder / file, text)
    return folder


def _replace(file: Path, text: str) -> None:
    """Other ranks may be reading what an earlier one wrote."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text)
    partial.rename(file)


def _byte_tokenizer() -> str:
    """One token per byte of UTF-8: any text has tokens, and the first 259 tokens of the vocabulary have a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return tokenizer.to_str()
