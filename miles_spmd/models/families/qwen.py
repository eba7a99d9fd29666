from __future__ import annotations

from typing import Any, ClassVar

from miles_spmd.models.blocks import Attention, Mixture, Mlp
from miles_spmd.models.blocks.experts import Router
from miles_spmd.models.family import Family
from miles_spmd.models.hf_config import count_experts

WINDOW: tuple[str, ...] = ("max_window_layers", "sliding_window", "use_sliding_window")


class Qwen2(Family):
    """Qwen2 and Qwen2.5: biases on query, key and value projections."""

    model_type = "qwen2"
    fields: ClassVar[tuple[str, ...]] = WINDOW

    def attention(self, number: int, **differences: Any) -> Attention:
        return super().attention(number, qkv_bias=True)


class Qwen3(Family):
    """Qwen3-0.6B ... 32B: queries and keys are normalised per head."""

    model_type = "qwen3"
    fields: ClassVar[tuple[str, ...]] = WINDOW
    required = (*Family.required, "head_dim")

    def attention(self, number: int, **differences: Any) -> Attention:
        return super().attention(number, qk_norm="head")


class _Routed(Family):
    """Experts in every layer, chosen by the softmax of their logits."""

    fields: ClassVar[tuple[str, ...]] = (
        *WINDOW,
        "decoder_sparse_step",
        "mlp_only_layers",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "num_local_experts",
    )

    def unsupported(self, config: dict[str, Any]) -> list[str]:
        problems = super().unsupported(config)
        if not count_experts(config):
            problems.append("num_experts is missing")
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            problems.append("dense layers between MoE layers are not supported (SGLang routes in every layer)")
        return problems

    def mixture(self, **differences: Any) -> Mixture:
        c = self.config
        # the softmax of the chosen logits equals all experts' probabilities divided by the sum of the chosen ones
        first = not c.get("norm_topk_prob", False)
        router = Router(count_experts(c), c["num_experts_per_tok"], softmax_first=first)
        return Mixture(c["hidden_size"], c["moe_intermediate_size"], router, **differences)


class Qwen3Moe(_Routed, Qwen3):
    """Qwen3-30B-A3B, 235B-A22B: no shared experts."""

    model_type = "qwen3_moe"
    fields = _Routed.fields
    required = (*Qwen3.required, "moe_intermediate_size", "num_experts_per_tok")

    def mlp(self, number: int) -> Mlp | Mixture:
        return self.mixture()


class Qwen2Moe(_Routed, Qwen2):
    """Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B: a gated shared expert beside the routed ones."""

    model_type = "qwen2_moe"
    fields = (*_Routed.fields, "qkv_bias", "shared_expert_intermediate_size")
    required = (*Qwen2.required, "moe_intermediate_size", "num_experts_per_tok", "shared_expert_intermediate_size")

    def unsupported(self, config: dict[str, Any]) -> list[str]:
        biases = [] if config.get("qkv_bias", True) is True else ["qkv_bias must be true"]
        return super().unsupported(config) + biases

    def mlp(self, number: int) -> Mlp | Mixture:
        size = self.config["shared_expert_intermediate_size"]
        return self.mixture(shared_size=size, shared_gate=True, shared_name="shared_expert")
