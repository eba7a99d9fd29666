"""What a layer's attention computes, and facts that determine which implementation engine and trainer share on a
GPU."""

from __future__ import annotations

from typing import NamedTuple


class Form(NamedTuple):
    """What a layer's attention computes, the same in engine and trainer; the defaults are plain causal attention."""

    window: int = 0
    """Number of most recent keys that a query sees, itself included (Hugging Face's ``sliding_window``); 0: all."""
    softcap: float = 0.0
    """Scores become ``softcap * tanh(score / softcap)`` after they were scaled (Gemma 2,
    https://arxiv.org/abs/2408.00118); 0: they stay."""


PLAIN = Form()

FLASH, SPLIT_KEYS = "fa3", "triton"  # SGLang's names; invariant/split_attention.py replaces the second
CAPABILITY = "9.0"  # compute capability of the GPUs that have FlashAttention 3
FLASH_HEADS = range(97, 129)  # head_dims for which FlashAttention 3 has the same key blocks in prefill and decode


def shared_attention(head_dim: int, capability: str) -> str:
    """Return the attention backend that engine and trainer share by default on a GPU of this compute capability."""
    return FLASH if capability == CAPABILITY and head_dim in FLASH_HEADS else SPLIT_KEYS
