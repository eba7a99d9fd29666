from __future__ import annotations

from typing import Any

from miles_spmd.models.blocks import Attention, Mlp
from miles_spmd.models.family import Family
from miles_spmd.models.hf_config import malformed_rope, rope_parameters


class Phi3(Family):
    """Phi-3 and Phi-4: query, key and value projections are one matrix in the checkpoint, gate and up another."""

    model_type = "phi3"
    sglang_module = "llama"
    fields = ("full_attn_mod", "interpolate_factor", "original_max_position_embeddings", "sliding_window")
    assumed_kv_heads = 0
    partial_rotary = True

    def unsupported(self, config: dict[str, Any]) -> list[str]:
        # Phi-4-mini has the first two fields, which its published code does not read.
        others = [key for key in self.fields[:2] if config.get(key) not in (None, 1)]
        return super().unsupported(config) + [f"{key} must be 1, not {config[key]!r}" for key in others]

    def unsupported_rope(self, config: dict[str, Any]) -> list[str]:
        if not malformed_rope(config) and rope_parameters(config)["rope_type"] in ("su", "yarn"):
            return ["rope types su and yarn are older names of longrope in this family; write longrope"]
        return super().unsupported_rope(config)

    def attention(self, number: int, **differences: Any) -> Attention:
        return super().attention(number, fused=True, window=self.config.get("sliding_window") or 0)

    def mlp(self, number: int) -> Mlp:
        return Mlp(self.config["hidden_size"], self.config["intermediate_size"], fused=True)
