"""A tokenizer and a small random Qwen3, written as a Hugging Face checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from miles_spmd.models import load_family
from miles_spmd.quickstart.language import CHAT_TEMPLATE, END, PAD, UNKNOWN, Language
from miles_spmd.types.files import write_whole

INITIALIZER_RANGE = 0.05
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": INITIALIZER_RANGE,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "torch_dtype": "float32",
}


def write_tokenizer(folder: Path, language: Language) -> None:
    """Write a tokenizer into ``folder``: one token per word of the language, so that decoding only concatenates
    tokens."""
    tokenizer = Tokenizer(models.WordLevel(language.vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(language.pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in language.special])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNKNOWN,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", settings)
    write_whole(folder / "chat_template.jinja", CHAT_TEMPLATE.encode())


def write_random_model(folder: Path, language: Language, seed: int) -> None:
    """Write random float32 weights into ``folder`` as transformers initialises them: matrices normal with the
    configuration's ``initializer_range``, norms 1."""
    ids = language.vocabulary
    config = CONFIG | {"vocab_size": len(ids), "eos_token_id": ids[END], "pad_token_id": ids[PAD]}
    _write_json(folder / "config.json", config)
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in load_family(config).checkpoint_tensors().items():
        values = np.ones(shape) if len(shape) == 1 else generator.normal(0, INITIALIZER_RANGE, shape)
        tensors[name] = values.astype(np.float32)
    save_file(tensors, file := folder / "model.safetensors", metadata={"format": "pt"})
    file.chmod((folder / "config.json").stat().st_mode & 0o777)  # safetensors lets its owner alone read it


def _write_json(path: Path, content: dict[str, object]) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
