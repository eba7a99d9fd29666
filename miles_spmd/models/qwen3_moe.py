"""Qwen3 mixture-of-experts models (Qwen3-30B-A3B, 235B-A22B): experts in every layer, without shared experts."""

from __future__ import annotations

import re
from math import prod
from typing import Any

from miles_spmd.models.family import Pieces, Shape, Shard, sglang_width, share, swiglu_tensors
from miles_spmd.models.layout import stack
from miles_spmd.models.qwen3 import Qwen3

# parameters of Transformer Engine's grouped linear layers; experts are numbered among those of the rank
EXPERT = re.compile(r"experts\.linear_fc([12])\.weight(\d+)")


class Qwen3Moe(Qwen3):
    model_type = "qwen3_moe"
    required = (*Qwen3.required, "moe_intermediate_size", "num_experts_per_tok")

    def __init__(self, config: dict[str, Any], *, value_head: bool = False) -> None:
        super().__init__(config, value_head=value_head)
        self.num_experts = count_experts(config)
        self.experts_per_token: int = config["num_experts_per_tok"]
        self.expert_ffn_size: int = config["moe_intermediate_size"]

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

    def num_active_parameters(self) -> int:
        one_expert = sum(map(prod, swiglu_tensors("", self.hidden_size, self.expert_ffn_size).values()))
        return self.num_parameters() - self.num_layers * (self.num_experts - self.experts_per_token) * one_expert

    def _mlp_tensors(self, prefix: str) -> dict[str, Shape]:
        tensors: dict[str, Shape] = {prefix + "gate.weight": (self.num_experts, self.hidden_size)}
        for expert in range(self.num_experts):
            tensors.update(swiglu_tensors(f"{prefix}experts.{expert}.", self.hidden_size, self.expert_ffn_size))
        return tensors

    def _megatron_mlp(self, prefix: str, name: str, tp: Shard, etp: Shard, ep: Shard) -> Pieces:
        if name == "router.weight":
            return self._whole(prefix + "gate.weight")
        experts = [f"{prefix}experts.{expert}." for expert in range(*ep.part(self.num_experts, f"{prefix}experts"))]
        if name == "experts.gate_up":
            return tuple(
                piece
                for number, expert in enumerate(experts)
                for side, half in enumerate(("gate_proj.weight", "up_proj.weight"))
                for piece in stack(share(expert + half, self.expert_ffn_size, etp), (self.hidden_size,), (number, side))
            )
        if name == "experts.down":
            return self._stacked_down(experts, etp)
        match = EXPERT.fullmatch(name)
        if match is None or int(match[2]) >= len(experts):
            return ()
        expert = experts[int(match[2])]
        return self._gate_up(expert, etp) if match[1] == "1" else self._column_shard(expert + "down_proj.weight", etp)

    def _sglang_mlp(self, prefix: str, name: str, shape: Shape, tp: Shard) -> Pieces:
        if name == "gate.weight":
            return self._whole(prefix + name)
        if name not in ("experts.w13_weight", "experts.w2_weight"):
            return ()
        experts = [f"{prefix}experts.{expert}." for expert in range(self.num_experts)]
        local = shape[1] // 2 if name == "experts.w13_weight" else shape[2]
        if shape[0] < self.num_experts:  # expert parallelism, with SGLang's ep_size equal to tp_size: experts are whole
            first, last = tp.part(self.num_experts, f"{prefix}experts")
            experts, tp, width = experts[first:last], Shard(0, 1), max(self.expert_ffn_size, local)
        else:
            width = sglang_width(self.expert_ffn_size, local, tp)
        if name == "experts.w2_weight":
            return self._stacked_down(experts, tp, width)
        return tuple(piece for i, expert in enumerate(experts) for piece in self._gate_up(expert, tp, width, (i,)))

    def _stacked_down(self, experts: list[str], tp: Shard, padded: int = 0) -> Pieces:
        down = "down_proj.weight"
        return tuple(p for i, expert in enumerate(experts) for p in self._column_shard(expert + down, tp, padded, (i,)))


def count_experts(config: dict[str, Any]) -> int:
    """transformers >= 5 writes num_local_experts where earlier versions wrote num_experts."""
    return config.get("num_local_experts") or config.get("num_experts") or 0
