"""A tiny Qwen3 checkpoint with a tokenizer, and a reference that computes the log-probs of any sequence."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

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
        loop = {"experts_implementation": "eager"}  # their grouped products take no float64
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **loop).eval()

    @torch.no_grad()
    def hidden(self, sequence: list[int]) -> torch.Tensor:
        """[len(sequence) - 1, hidden size]: what the output layer ``model.lm_head`` makes logits of."""
        return self.model.model(torch.tensor([sequence])).last_hidden_state[0, :-1]

    @torch.no_grad()
    def log_probs(
        self, sequence: list[int], temperature: float = 1.0, top_p: float = 1.0, top_k: int = -1
    ) -> torch.Tensor:
        """[len(sequence) - 1, vocabulary]: row t is the distribution of token t + 1, of what both cuts leave alone."""
        log_probs = (self.model.lm_head(self.hidden(sequence)) / temperature).log_softmax(-1)
        cuts = [TopKLogitsWarper(top_k)] if top_k > 0 else []
        cuts += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        left = log_probs
        for cut in cuts:
            left = left.where(cut(None, log_probs).isfinite(), -torch.inf)
        return left.log_softmax(-1)

    def of_tokens(self, sequence: list[int], *distribution: float) -> torch.Tensor:
        """[len(sequence) - 1]: the log-prob of every token but the first."""
        return self.log_probs(sequence, *distribution).gather(-1, torch.tensor(sequence[1:])[:, None]).squeeze(-1)
