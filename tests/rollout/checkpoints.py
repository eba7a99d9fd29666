"""A tiny Qwen3 checkpoint with a tokenizer, and a reference that computes the log-probs of any sequence."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 100  # no multiple of what SGLang pads to
EOS = 99
CONTEXT = 160


def write(folder: Path, seed: int) -> Path:
    """Every token reads as one character; random weights, scaled so that the distributions are not flat."""
    tokenizer = Tokenizer(models.WordLevel({chr(256 + i): i for i in range(VOCAB_SIZE)}, unk_token=chr(256)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=chr(256 + EOS)).save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        eos_token_id=EOS,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    model.save_pretrained(folder)
    return folder


class Reference:
    """transformers in float64: what an engine's log-probs are compared with."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    @torch.no_grad()
    def log_probs(self, sequence: list[int], temperature: float = 1.0) -> torch.Tensor:
        """[len(sequence) - 1, vocabulary]: row t is the distribution of token t + 1."""
        return (self.model(torch.tensor([sequence])).logits[0, :-1] / temperature).log_softmax(-1)

    def of_tokens(self, sequence: list[int], temperature: float = 1.0) -> torch.Tensor:
        """[len(sequence) - 1]: the log-prob of every token but the first."""
        return self.log_probs(sequence, temperature).gather(-1, torch.tensor(sequence[1:])[:, None]).squeeze(-1)
