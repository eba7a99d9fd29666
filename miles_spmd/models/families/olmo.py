from __future__ import annotations

from typing import Any

from miles_spmd.models.blocks import Attention, Norms
from miles_spmd.models.family import Family


class Olmo2(Family):
    """OLMo 2: norms after each block only, and one norm over all heads of a token's queries, and of its keys."""

    model_type = "olmo2"
    assumed_kv_heads = 0
    norms = Norms("", "post_attention_layernorm", "", "post_feedforward_layernorm")

    def attention(self, number: int, **differences: Any) -> Attention:
        return super().attention(number, qk_norm="width")
