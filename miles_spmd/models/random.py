"""Checkpoint folders of well-known shapes without weights, for speed runs: ``random:qwen3-4b``.

Speed does not depend on the values of weights. A folder holds a configuration, a tokenizer and, in the place of
gigabytes of safetensors, an empty file that makes ``weights.hugging_face.load`` generate the weights. A configuration
names the folder before it exists; a run writes it when it starts.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PREFIX = "random:"
NO_WEIGHTS = "weights.random"

# As published, but without end-of-sequence token: every response has the maximum length, so that runs are comparable.
_COMMON = {
    "bos_token_id": None,
    "dtype": "bfloat16",
    "eos_token_id": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
_QWEN3 = _COMMON | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rope_theta": 1000000,
    "vocab_size": 151936,
}
_QWEN3_MOE = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
_QWEN2 = _COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "vocab_size": 151936,
}
_LLAMA = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "head_dim": 64,
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
    "vocab_size": 128256,
}
_SMOLLM2 = _LLAMA | {
    "max_position_embeddings": 8192,
    "num_key_value_heads": 3,
    "rope_theta": 100000.0,
    "rope_scaling": None,
    "vocab_size": 49152,
}
_MISTRAL = _COMMON | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
_MIXTRAL = _MISTRAL | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
_GEMMA2 = _COMMON | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
_GEMMA3 = _COMMON | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
_PHI4_MINI = _COMMON | {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "pad_token_id": None,
    "partial_rotary_factor": 0.75,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "vocab_size": 200064,
}
_OLMO2 = _COMMON | {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "attention_bias": False,
    "max_position_embeddings": 4096,
    "num_key_value_heads": 32,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}
_GLM4 = _COMMON | {
    "architectures": ["Glm4ForCausalLM"],
    "model_type": "glm4",
    "attention_bias": True,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151552,
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPES: dict[str, dict[str, Any]] = {
    name: family | dict(zip(_SIZES, sizes))
    for name, family, *sizes in (
        ("smollm2-135m", _SMOLLM2, 576, 1536, 30, 9),
        ("qwen3-0.6b", _QWEN3, 1024, 3072, 28, 16),
        ("qwen3-1.7b", _QWEN3, 2048, 6144, 28, 16),
        ("qwen3-4b", _QWEN3, 2560, 9728, 36, 32),
        ("qwen3-8b", _QWEN3 | {"tie_word_embeddings": False}, 4096, 12288, 36, 32),
        ("qwen3-30b-a3b", _QWEN3_MOE, 2048, 6144, 48, 32),
        ("qwen2.5-1.5b", _QWEN2, 1536, 8960, 28, 12),
        ("llama-3.2-1b", _LLAMA, 2048, 8192, 16, 32),
        ("mistral-7b", _MISTRAL, 4096, 14336, 32, 32),
        ("mixtral-8x7b", _MIXTRAL, 4096, 14336, 32, 32),
        ("gemma-2-2b", _GEMMA2, 2304, 9216, 26, 8),
        ("gemma-3-1b", _GEMMA3, 1152, 6912, 26, 4),
        ("phi-4-mini", _PHI4_MINI, 3072, 8192, 32, 24),
        ("olmo-2-7b", _OLMO2, 4096, 11008, 32, 32),
        ("glm-4-9b", _GLM4, 4096, 13696, 40, 32),
    )
}

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def resolve(folder: Path) -> Path:
    """Return the folder that stands for ``random:SHAPE`` or ``random:SHAPE/LAYERS`` (with so many layers), whether it
    exists or not, and any other folder unchanged. Raises ValueError naming the known shapes."""
    name = str(folder)
    if not name.startswith(PREFIX):
        return folder
    shape, _, layers = name.removeprefix(PREFIX).partition("/")
    if layers and not re.fullmatch(r"[1-9]\d*", layers):
        raise ValueError(f"{name}: {layers!r} is not a number of layers")
    if shape not in SHAPES:
        near = difflib.get_close_matches(shape, SHAPES, n=1)
        hint = f", did you mean {PREFIX}{near[0]}?" if near else ""
        raise ValueError(f"{name}: no such shape{hint} (known: {', '.join(SHAPES)})")
    return _cache() / (f"{shape}-{layers}" if layers else shape)


def random_config(folder: Path) -> dict[str, Any] | None:
    """Return the contents of config.json in a folder of :func:`resolve`, whether it exists or not; None for others."""
    match = re.fullmatch(rf"({'|'.join(map(re.escape, SHAPES))})(?:-(\d+))?", folder.name)
    if match is None or folder.parent != _cache():
        return None
    return SHAPES[match[1]] | ({"num_hidden_layers": int(match[2])} if match[2] else {})


def write_random_checkpoints(folders: Iterable[Path]) -> None:
    """Write those of ``folders`` that stand for random models, before anything reads them. Raises OSError."""
    for folder in folders:
        if (config := random_config(folder)) is not None:
            write_random_checkpoint(folder, config)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miles-spmd" / "random"


def write_random_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Write the folder of a random model that has this config.json. Raises OSError."""
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": _SPECIAL[0], "eos_token": _SPECIAL[2]}
    files = {
        "config.json": json.dumps(config, indent=2),
        "tokenizer.json": _byte_tokenizer(),
        "tokenizer_config.json": json.dumps(tokenizer, indent=2),
        "chat_template.jinja": _CHAT_TEMPLATE,
        NO_WEIGHTS: "",
    }
    for name, text in files.items():
        # Other ranks may be reading what an earlier one wrote: a file appears whole or not at all.
        partial = folder / f".{name}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(text)
            partial.rename(folder / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise OSError(error.errno, f"{error.strerror}; set XDG_CACHE_HOME", str(folder / name)) from None


def _byte_tokenizer() -> str:
    """One token per byte of UTF-8: any text has tokens, and the first 259 tokens of the vocabulary have a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return tokenizer.to_str()
