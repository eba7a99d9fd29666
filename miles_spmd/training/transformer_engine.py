"""Layers of Transformer Engine's modules: norms fused with the linears that follow, cuDNN's attention, FP8 products,
grouped experts. Importing this file requires the package."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention, fused_apply_rotary_pos_emb
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer import TransformerConfig, TransformerLayerSubmodules
from torch import Tensor

from miles_spmd.models import blocks
from miles_spmd.training.attention import PackedAttention, PackedSequences


class RotaryDotProductAttention(TEDotProductAttention):
    """Megatron's fused attention over packed streams, with rotary positions applied by one kernel each to queries and
    keys.

    The kernel rounds once where :class:`PackedAttention` rounds cosines, sines and products, so their results are not
    bitwise equal.
    """

    def __init__(self, *args: Any, attention: blocks.Attention, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rope = attention.rope

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, packed_seq_params: PackedSequences, **kwargs: Any
    ) -> Tensor:
        """``query`` [T, H, D], ``key`` and ``value`` [T, G, D] -> [T, H * D]."""
        if self.rope:
            angles = packed_seq_params.angles[self.rope].unsqueeze(1)
            query, key = (fused_apply_rotary_pos_emb(x.unsqueeze(1), angles).squeeze(1) for x in (query, key))
        return super().forward(query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs)


def layer_submodules(config: TransformerConfig, layer: blocks.Layer) -> TransformerLayerSubmodules:
    """Return the modules of a layer. Under context parallelism attention is :class:`PackedAttention`, which gathers
    keys and values once; Transformer Engine's would pass them around in a ring."""
    experts = config.num_moe_experts if isinstance(layer.mlp, blocks.Mixture) else None
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=bool(layer.attention.qk_norm)
    )
    gathers = config.context_parallel_size > 1
    attention = PackedAttention if gathers else RotaryDotProductAttention
    spec.submodules.self_attention.submodules.core_attention = partial(attention, attention=layer.attention)
    return spec.submodules
