"""A tokenizer and a small random Qwen3, written as a Hugging Face checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from miles_spmd.models import load_family
from miles_spmd.quickstart.task import UP_TO_NINETEEN
from miles_spmd.types.files import write_whole

PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"
SPECIAL = (PAD, END, UNKNOWN, "<|user|>", "<|assistant|>")
WORDS = (" plus ", " in words", " in digits", *"0123456789", *UP_TO_NINETEEN, "twenty", "twenty-")
VOCABULARY = {token: i for i, token in enumerate((*SPECIAL, *WORDS))}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

INITIALIZER_RANGE = 0.05
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": len(VOCABULARY),
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
    "eos_token_id": VOCABULARY[END],
    "pad_token_id": VOCABULARY[PAD],
    "torch_dtype": "float32",
}


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer into ``folder``: one token per digit, per number word and per operator with its spaces, so that
    decoding only concatenates tokens."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" plus | in words| in digits|[a-z]+-?|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
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


def write_random_model(folder: Path, seed: int) -> None:
    """Write random float32 weights into ``folder`` as transformers initialises them: matrices normal with the
    configuration's ``initializer_range``, norms 1."""
    _write_json(folder / "config.json", CONFIG)
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in load_family(CONFIG).checkpoint_tensors().items():
        values = np.ones(shape) if len(shape) == 1 else generator.normal(0, INITIALIZER_RANGE, shape)
        tensors[name] = values.astype(np.float32)
    save_file(tensors, file := folder / "model.safetensors", metadata={"format": "pt"})
    file.chmod((folder / "config.json").stat().st_mode & 0o777)  # safetensors lets its owner alone read it


def _write_json(path: Path, content: dict[str, object]) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
