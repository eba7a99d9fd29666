from __future__ import annotations

from miles_spmd.models.family import Family


class Llama(Family):
    """Llama 2 and 3; 3.1 and later scale the rotary frequencies (rope type llama3)."""

    model_type = "llama"
    assumed_kv_heads = 0
