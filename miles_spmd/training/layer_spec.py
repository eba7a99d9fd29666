"""The modules of a transformer layer: Megatron's local ones with our norm and our packed attention, or Transformer
Engine's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from miles_spmd.invariant.operators import rms_norm
from miles_spmd.training.attention import PackedAttention, PackedSequences
from miles_spmd.training.experts import MoE
from miles_spmd.training.invariant_layers import InvariantColumnParallelLinear, InvariantRowParallelLinear, SwiGLU
from miles_spmd.training.megatron_config import NetworkConfig


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm for every norm of a layer.

    Megatron's wrapper of torch's norm does not support sequence parallelism, for which a norm only has to mark its
    weight: each rank has part of the tokens, so that the gradients of the ranks must be summed.
    """

    def __init__(self, config: NetworkConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps, self.invariant = eps, config.invariant

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and not self.invariant:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps)


class LastLayer(TransformerLayer):
    """The model's last layer, whose MLP runs on scored positions only: after the last attention nothing mixes tokens.

    Not for sequence parallelism, where the stream is split by position and scored positions are selected after it is
    gathered.
    """

    def _forward_attention(self, *args: Any, packed_seq_params: PackedSequences, **kwargs: Any) -> tuple[Tensor, Any]:
        hidden, context = super()._forward_attention(*args, packed_seq_params=packed_seq_params, **kwargs)
        return hidden.index_select(0, packed_seq_params.scored), context


def block_spec(config: NetworkConfig, vp_stage: int | None, last: bool) -> TransformerBlockSubmodules:
    """Return the layers of one pipeline chunk. ``last``: the chunk at the end of the model."""
    layers: list[type[TransformerLayer]] = [TransformerLayer] * get_num_layers_to_build(config, vp_stage)
    # FP8 products require a multiple of their block size, which the number of scored positions is not
    if last and layers and not config.sequence_parallel and not config.fp8:
        layers[-1] = LastLayer
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        from miles_spmd.training.transformer_engine import layer_submodules  # fails to import without the package

        submodules, norm = layer_submodules(config), TENorm
    else:
        submodules, norm = _local_submodules(config), RMSNorm
    return TransformerBlockSubmodules([ModuleSpec(layer, submodules=submodules) for layer in layers], norm)


def _local_submodules(config: NetworkConfig) -> TransformerLayerSubmodules:
    column: type = InvariantColumnParallelLinear if config.invariant else ColumnParallelLinear
    row: type = InvariantRowParallelLinear if config.invariant else RowParallelLinear
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    return TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=column,
                core_attention=PackedAttention,
                linear_proj=row,
                q_layernorm=qk_norm,
                k_layernorm=qk_norm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNorm,
        mlp=MoE
        if config.num_moe_experts
        else partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(column, row, SwiGLU)),
        mlp_bda=get_bias_dropout_add,
    )
