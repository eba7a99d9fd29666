"""Layers of Transformer Engine's modules, Megatron's fast ones: norms fused with the linears behind them, cuDNN's
attention, FP8 products, grouped experts. To be imported only where the package is installed."""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention, fused_apply_rotary_pos_emb
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer import TransformerConfig, TransformerLayerSubmodules
from torch import Tensor

from miles_spmd.training.attention import PackedAttention, PackedSequences


class RotaryDotProductAttention(TEDotProductAttention):
    """Megatron's fused attention over packed streams, with queries and keys turned by one kernel each.

    Rounds once where :class:`PackedAttention` rounds cosines, sines and products, so the two differ in the last bits.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any,
        attention_bias: Tensor | None = None,
        *,
        packed_seq_params: PackedSequences,
    ) -> Tensor:
        """``query`` [T, H, D], ``key`` and ``value`` [T, G, D] -> [T, H * D]."""
        query, key = (
            fused_apply_rotary_pos_emb(x.unsqueeze(1), packed_seq_params.angles.unsqueeze(1)).squeeze(1)
            for x in (query, key)
        )
        return super().forward(query, key, value, attention_mask, attn_mask_type, packed_seq_params=packed_seq_params)


def layer_submodules(config: TransformerConfig) -> TransformerLayerSubmodules:
    """Under context parallelism attention is ours: it gathers keys and values once, where Transformer Engine's sends
    them around in a ring of its own."""
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    attention = PackedAttention if config.context_parallel_size > 1 else RotaryDotProductAttention
    spec.submodules.self_attention.submodules.core_attention = attention
    return spec.submodules
