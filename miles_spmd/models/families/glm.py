from __future__ import annotations

from typing import Any, ClassVar

from miles_spmd.models.blocks import Attention, Mixture, Mlp, Norms
from miles_spmd.models.blocks.experts import Router
from miles_spmd.models.family import Family


class Glm4(Family):
    """GLM-4-0414: norms before and after each block; half of a head is rotated, in pairs of neighbours."""

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


class Glm4Moe(Family):
    """GLM-4.5, 4.6, 4.7 and Air: experts behind the first layers, chosen by the sigmoid of their logits with a
    correction bias, and shared experts beside them."""

    model_type = "glm4_moe"
    fields: ClassVar[tuple[str, ...]] = (
        "first_k_dense_replace",
        "moe_intermediate_size",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "norm_topk_prob",
        "num_experts_per_tok",
        "num_nextn_predict_layers",
        "routed_scaling_factor",
        "topk_group",
        "use_qk_norm",
    )
    required = (*Family.required, "head_dim", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")
    assumed_kv_heads = 8
    partial_rotary = has_attention_bias = True

    def attention(self, number: int, **differences: Any) -> Attention:
        c = self.config
        norm = "head" if c.get("use_qk_norm", False) else ""
        return super().attention(number, qkv_bias=c.get("attention_bias", False), qk_norm=norm)

    def mlp(self, number: int) -> Mlp | Mixture:
        c = self.config
        if number < c.get("first_k_dense_replace", 1):
            return Mlp(c["hidden_size"], c["intermediate_size"])
        groups = c.get("n_group", 1)
        router = Router(
            c["n_routed_experts"],
            c["num_experts_per_tok"],
            scores="sigmoid",
            bias=True,
            normalize=c.get("norm_topk_prob", True),
            groups=groups,
            groups_per_token=c.get("topk_group", 1),
            best_of_group=2 if groups > 1 else 1,
            scale=c.get("routed_scaling_factor", 1.0),
            logit_dtype="fp32",
        )
        width = c["moe_intermediate_size"]
        return Mixture(c["hidden_size"], width, router, shared_size=width * c.get("n_shared_experts", 1))

    def is_ignored(self, name: str) -> bool:
        """The layers that predict further tokens are behind the last one, and not part of the model here."""
        behind = range(self.num_layers, self.num_layers + (self.config.get("num_nextn_predict_layers") or 0))
        return super().is_ignored(name) or any(name.startswith(f"model.layers.{number}.") for number in behind)
