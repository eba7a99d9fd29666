from __future__ import annotations

from typing import Any

from miles_spmd.models.blocks import Attention, Mlp
from miles_spmd.models.family import Family


class Phi3(Family):
    """Phi-3 and Phi-4: query, key and value projections are one matrix in the checkpoint, gate and up another."""

    model_type = "phi3"
    sglang_module = "llama"
    fields = ("original_max_position_embeddings", "sliding_window")
    assumed_kv_heads = 0
    partial_rotary = True

    def attention(self, number: int, **differences: Any) -> Attention:
        return super().attention(number, fused=True, window=self.config.get("sliding_window") or 0)

    def mlp(self, number: int) -> Mlp:
        return Mlp(self.config["hidden_size"], self.config["intermediate_size"], fused=True)
