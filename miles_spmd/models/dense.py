"""Dense model families, each by its differences from :class:`~miles_spmd.models.family.Family`."""

from __future__ import annotations

from miles_spmd.models.family import Family


class Llama(Family):
    """Llama 2 and 3; 3.1 and later scale the rotary frequencies (rope type llama3)."""

    model_type = "llama"
    assumed_kv_heads = 0


class Qwen2(Family):
    """Qwen2 and Qwen2.5: biases on query, key and value projections."""

    model_type = "qwen2"
    qkv_bias = True


class Qwen3(Family):
    """Qwen3-0.6B ... 32B: queries and keys are normalised per head."""

    model_type = "qwen3"
    qk_norm = True
    required = (*Family.required, "head_dim")
