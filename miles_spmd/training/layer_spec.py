"""The modules of a transformer layer: Megatron's local ones with our norm and our packed attention, or Transformer
Engine's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from miles_spmd.invariant.operators import one_more, rms_norm
from miles_spmd.models.blocks import Layer, Mlp
from miles_spmd.training.attention import PackedAttention, PackedSequences
from miles_spmd.training.experts import MoE
from miles_spmd.training.invariant_layers import Gated, InvariantColumnParallelLinear, InvariantRowParallelLinear
from miles_spmd.training.megatron_config import NetworkConfig


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm for every norm of a layer, by its weight or by 1 + weight.

    Megatron's wrapper of torch's norm does not support sequence parallelism, for which a norm only has to mark its
    weight: each rank has part of the tokens, so that the gradients of the ranks must be summed.
    """

    def __init__(self, config: NetworkConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps, self.invariant = eps, config.invariant
        self.zero_centred: bool = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        if self.zero_centred:
            return rms_norm(x, one_more(self.weight), self.eps)
        if x.is_cuda and not self.invariant:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps)


class WidthNorm(RMSNorm):
    """Norm over all heads of a token's queries, or of its keys. Every tensor-parallel rank has the whole weight, and
    computes the norm of all ranks' heads; Megatron sums the gradients of such weights over the ranks by their names."""

    def __init__(self, config: NetworkConfig, hidden_size: int, eps: float, heads: int, **_: Any) -> None:
        super().__init__(config, heads * hidden_size, eps)
        self.group = get_tensor_model_parallel_group()
        if heads % self.group.size():
            raise ValueError(
                f"megatron.tensor_model_parallel_size {self.group.size()} does not divide {heads} heads that are "
                "normalised together"
            )

    def forward(self, x: Tensor) -> Tensor:
        """``x`` and result [..., heads of this rank, head_dim]."""
        wide = x.flatten(-2)
        if self.group.size() > 1:
            wide = all_gather_last_dim_from_tensor_parallel_region(wide, self.group)
        return super().forward(wide.contiguous()).chunk(self.group.size(), -1)[self.group.rank()].reshape(x.shape)


class _Normed:
    """A block whose output is normalised before it is added to the residual stream. Stands before Megatron's class."""

    def __init__(self, config: NetworkConfig, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)  # type: ignore[call-arg]
        self.post_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, None]:
        output, bias = super().forward(*args, **options)  # type: ignore[misc]
        return self.post_norm(output if bias is None else output + bias), None


class NormedAttention(_Normed, SelfAttention): ...


class NormedMLP(_Normed, MLP): ...


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
    first = get_transformer_layer_offset(config, vp_stage)
    here = config.layers[first : first + get_num_layers_to_build(config, vp_stage)]
    modules: list[type[TransformerLayer]] = [TransformerLayer] * len(here)
    # FP8 products require a multiple of their block size, which the number of scored positions is not
    if last and modules and not config.sequence_parallel and not config.fp8:
        modules[-1] = LastLayer
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        from miles_spmd.training.transformer_engine import layer_submodules  # fails to import without the package

        submodules, norm = [layer_submodules(config, layer) for layer in here], TENorm
    else:
        submodules, norm = [_local_submodules(config, layer) for layer in here], RMSNorm
    return TransformerBlockSubmodules(
        [ModuleSpec(module, submodules=parts) for module, parts in zip(modules, submodules)], norm
    )


def _local_submodules(config: NetworkConfig, layer: Layer) -> TransformerLayerSubmodules:
    column: type = InvariantColumnParallelLinear if config.invariant else ColumnParallelLinear
    row: type = InvariantRowParallelLinear if config.invariant else RowParallelLinear
    norms, attention = layer.norms, layer.attention
    q_norm = k_norm = RMSNorm if attention.qk_norm else IdentityOp
    if attention.qk_norm == "width":
        q_norm, k_norm = (partial(WidthNorm, heads=n) for n in (attention.num_heads, attention.num_kv_heads))
    mlp: Any = MoE
    if isinstance(layer.mlp, Mlp):
        kind = NormedMLP if norms.after_mlp else MLP
        activation = partial(Gated, activation=layer.mlp.activation)
        mlp = partial(kind.as_mlp_submodule, submodules=MLPSubmodules(column, row, activation))
    return TransformerLayerSubmodules(
        input_layernorm=RMSNorm if norms.before_attention else IdentityOp,
        self_attention=ModuleSpec(
            module=NormedAttention if norms.after_attention else SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=column,
                core_attention=partial(PackedAttention, attention=attention),
                linear_proj=row,
                q_layernorm=q_norm,
                k_layernorm=k_norm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNorm if norms.before_mlp else IdentityOp,
        mlp=mlp,
        mlp_bda=get_bias_dropout_add,
    )
