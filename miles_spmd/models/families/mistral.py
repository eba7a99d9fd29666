from __future__ import annotations

from typing import Any, ClassVar

from miles_spmd.models.blocks import Attention, Mixture, Mlp
from miles_spmd.models.blocks.experts import Router
from miles_spmd.models.family import Family


class Mistral(Family):
    """Mistral 7B, Nemo, Small: in the first of them a query sees the last 4,096 keys."""

    model_type = "mistral"
    fields: ClassVar[tuple[str, ...]] = ("sliding_window",)
    assumed_kv_heads = 8
    assumed_window: ClassVar[int] = 4096  # where the config does not name it; null: there is none

    def attention(self, number: int, **differences: Any) -> Attention:
        return super().attention(number, window=self.config.get("sliding_window", self.assumed_window) or 0)


class Mixtral(Mistral):
    """Mixtral 8x7B, 8x22B: experts in every layer."""

    model_type = "mixtral"
    fields = (*Mistral.fields, "num_experts_per_tok", "num_local_experts", "router_jitter_noise")
    required = (*Family.required, "num_experts_per_tok", "num_local_experts")
    assumed_window = 0

    def mlp(self, number: int) -> Mlp | Mixture:
        c = self.config
        return Mixture(
            c["hidden_size"],
            c["intermediate_size"],
            Router(c["num_local_experts"], c["num_experts_per_tok"], softmax_first=False),
            name="block_sparse_moe",
            names=("w1.weight", "w3.weight", "w2.weight"),
        )
