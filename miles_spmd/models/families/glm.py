from __future__ import annotations

from typing import Any

from miles_spmd.models.blocks import Attention, Mlp, Norms
from miles_spmd.models.family import Family


class Glm4(Family):
    """GLM-4-0414: norms before and after each block; half of a head's numbers are rotated, in neighbouring pairs."""

    model_type = "glm4"
    required = (*Family.required, "head_dim")
    assumed_kv_heads = 2
    partial_rotary = interleaved_rotary = True
    norms = Norms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    has_attention_bias = True

    def attention(self, number: int, **differences: Any) -> Attention:
        return super().attention(number, qkv_bias=self.config.get("attention_bias", True))

    def mlp(self, number: int) -> Mlp:
        return Mlp(self.config["hidden_size"], self.config["intermediate_size"], fused=True)
