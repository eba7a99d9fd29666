"""Checkpoints of chosen shapes with random weights: speed does not depend on their values."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 512


def write_random_checkpoint(folder: Path, hidden_size: int, num_layers: int, intermediate_size: int) -> None:
    """Write a Qwen3 with 8 heads in 4 groups, and a tokenizer whose words are the numbers below VOCABULARY."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "0", "pad_token": "0", "eos_token": "1"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden_size // 8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
