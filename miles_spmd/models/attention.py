"""Facts about attention that decide which implementation engine and trainer share on a GPU."""

from __future__ import annotations

from typing import Any

FLASH, SPLIT_KEYS = "fa3", "triton"  # SGLang's names; for the second, invariant/split_attention.py takes its place
CAPABILITY = "9.0"  # compute capability of the GPUs that have FlashAttention 3
FLASH_HEADS = range(97, 129)  # values of head_dim whose keys FlashAttention 3 reads in the same blocks in decode


def head_dim(shape: dict[str, Any]) -> int:
    """Numbers of an attention head, 0 where ``shape`` does not say."""
    heads = shape.get("num_attention_heads")
    return shape.get("head_dim") or (shape.get("hidden_size", 0) // heads if heads else 0)


def shared_attention(head_dim: int, capability: str) -> str:
    """Return the attention backend that engine and trainer share by default on a GPU of this compute capability."""
    return FLASH if capability == CAPABILITY and head_dim in FLASH_HEADS else SPLIT_KEYS
