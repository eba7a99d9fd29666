"""Qwen3 mixture-of-experts models (Qwen3-30B-A3B, 235B-A22B): experts in every layer, without shared experts."""

from __future__ import annotations

import re
from typing import Any

from miles_spmd.models.dense import Qwen3
from miles_spmd.models.family import Pieces, Shape, Shards, padded_width, share, swiglu_tensors
from miles_spmd.models.layout import stack

# Stacks of SGLang and of our own layer for Megatron, which has gate and up apart; parameters of Transformer Engine's
# grouped linear layers, in which experts are numbered among those of the rank
EXPERT = re.compile(r"experts\.(w13_weight|w2_weight|gate_up|linear_fc[12]\.weight(?=\d))(\d*)")


class Qwen3Moe(Qwen3):
    model_type = "qwen3_moe"
    required = (*Qwen3.required, "moe_intermediate_size", "num_experts_per_tok")

    def __init__(self, config: dict[str, Any], *, value_head: bool = False) -> None:
        super().__init__(config, value_head=value_head)
        self.num_experts = count_experts(config)
        self.experts_per_token = config["num_experts_per_tok"]
        self.expert_ffn_size = config["moe_intermediate_size"]

    def unsupported(self, config: dict[str, Any]) -> list[str]:
        problems = super().unsupported(config)
        if not count_experts(config):
            problems.append("num_experts is missing")
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            problems.append("dense layers between MoE layers are not supported (SGLang routes in every layer)")
        return problems

    def transformer_config(self) -> dict[str, Any]:
        return {
            **super().transformer_config(),
            "num_moe_experts": self.num_experts,
            "moe_ffn_hidden_size": self.expert_ffn_size,
            "moe_router_topk": self.experts_per_token,
            "moe_router_score_function": "softmax",
            # softmax over the top-k logits equals the renormalised softmax over all
            "moe_router_pre_softmax": not self.config.get("norm_topk_prob", False),
            "moe_router_load_balancing_type": "none",
        }

    def _mlp_tensors(self, prefix: str) -> dict[str, Shape]:
        tensors: dict[str, Shape] = {prefix + "gate.weight": (self.num_experts, self.hidden_size)}
        for expert in range(self.num_experts):
            tensors.update(swiglu_tensors(f"{prefix}experts.{expert}.", self.hidden_size, self.expert_ffn_size))
        return tensors

    def _mlp(self, prefix: str, name: str, shape: Shape, shards: Shards) -> Pieces:
        if name == "gate.weight":
            return self._whole(prefix + name)
        tp, etp, ep = shards
        experts = [f"{prefix}experts.{expert}." for expert in range(*ep.part(self.num_experts, f"{prefix}experts"))]
        match = EXPERT.fullmatch(name)
        if match is None or int(match[2] or 0) >= len(experts):
            return ()
        # a stack of the rank's experts, or one of them
        held = [((), experts[int(match[2])])] if match[2] else [((i,), expert) for i, expert in enumerate(experts)]
        if match[1] == "gate_up":
            return tuple(
                piece
                for lead, expert in held
                for side, half in enumerate(("gate_proj.weight", "up_proj.weight"))
                for piece in stack(share(expert + half, self.expert_ffn_size, etp), (self.hidden_size,), (*lead, side))
            )
        if match[1] in ("w13_weight", "linear_fc1.weight"):
            width = padded_width(self.expert_ffn_size, shape[-2] // 2, etp, tp)
            return tuple(piece for lead, expert in held for piece in self._gate_up(expert, etp, width, lead))
        width = padded_width(self.expert_ffn_size, shape[-1], etp, tp)
        down = [(lead, expert + "down_proj.weight") for lead, expert in held]
        return tuple(piece for lead, name in down for piece in self._column_shard(name, etp, width, lead))


def count_experts(config: dict[str, Any]) -> int:
    """transformers >= 5 writes num_local_experts where earlier versions wrote num_experts."""
    return config.get("num_local_experts") or config.get("num_experts") or 0
