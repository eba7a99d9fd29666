"""The user's ``[megatron]`` table, dispatched by field name to the three dataclasses that configure Megatron."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import random
from megatron.core.transformer import TransformerConfig

from miles_spmd.config import Config
from miles_spmd.config.backends import DEFAULTS
from miles_spmd.invariant.flash import shared_backend
from miles_spmd.invariant.split_attention import part_length
from miles_spmd.models import Family
from miles_spmd.models.attention import SPLIT_KEYS
from miles_spmd.models.blocks import Layer, Mixture, Mlp, Norms
from miles_spmd.models.blocks.experts import SWIGLU, Experts, Router

# The local layers' dispatcher takes every token to all of its experts, by all-to-all, and supports none of these.
UNSUPPORTED_BY_LOCAL_EXPERTS = (
    "moe_apply_probs_on_input",
    "moe_expert_capacity_factor",
    "moe_latent_size",
    "moe_pad_expert_input_to_capacity",
    "moe_permute_fusion",
    "moe_router_padding_for_quantization",
    "moe_shared_expert_overlap",
)
# What Megatron's launcher accepts beside the dataclasses' fields; virtual_pipeline_model_parallel_size is derived from
# it.
LAYERS_PER_VIRTUAL_STAGE = "num_layers_per_virtual_pipeline_stage"


@dataclasses.dataclass
class NetworkConfig(TransformerConfig):
    """Megatron's configuration of a network, and what our layers need beside it."""

    layers: tuple[Layer, ...] = ()
    """The blocks of the whole model's layers."""
    context: int = 0
    """The longest sequence of the run, on which the frequencies of some rotary positions depend; the engine's."""
    router: Router | None = None
    """How experts are chosen; None: as Megatron's own fields say."""
    experts: Experts = SWIGLU
    """What an expert computes."""
    invariant: bool = False
    """Layers compute with :mod:`miles_spmd.invariant`; Megatron's own ``batch_invariant_mode`` has other kernels and
    restrictions. The fields below are read under this one."""
    partial_sums: int = 1
    """Number of partial sums when tensor-parallel ranks combine a layer's output; a multiple of the number of ranks."""
    split_keys: int = 0
    """Number of keys of a part in split attention; 0: FlashAttention 3, which does not split keys."""
    expert_partial_sums: int = 1
    """Number of partial sums when expert outputs are combined; equal to the engine's expert-parallel size."""


@dataclasses.dataclass(frozen=True)
class MegatronConfig:
    """The three dataclasses that configure Megatron."""

    transformer: NetworkConfig
    optimizer: OptimizerConfig
    ddp: DistributedDataParallelConfig

    @property
    def token_multiple(self) -> int:
        """Return what the number of tokens of a linear must be a multiple of: FP8 has one scale for 128 of them."""
        return 128 if self.transformer.fp8 else 1


def build_megatron_config(config: Config, family: Family) -> MegatronConfig:
    """Return Megatron's dataclasses for this run: our defaults, overridden by the model's sizes, overridden by the
    user's ``[megatron]`` table.

    A key that is a field of several dataclasses (``use_distributed_optimizer``) goes to each; the configuration was
    checked to have no other keys. Raises ValueError for what the trainer does not support, and whatever Megatron's own
    validation raises.
    """
    table = DEFAULTS["megatron"] | _with_virtual_stages(config.megatron, family.num_layers)
    _refuse_unsupported(table)
    if config.determinism.deterministic:
        table = {"deterministic_mode": True} | table
    if config.determinism.parity == "bitwise":
        table = {"invariant": True} | _as_the_engine(config, family) | table
    dtype = getattr(torch, config.model.dtype)
    names = ("params_dtype", "pipeline_dtype", "autocast_dtype")
    dtypes = dict.fromkeys(names, dtype) | {"bf16": dtype is torch.bfloat16}
    _refuse_unsupported_blocks(table, family.layers)
    ours: dict[str, Any] = {"layers": family.layers, "context": _context(config, family)}
    mixture = next((layer.mlp for layer in family.layers if isinstance(layer.mlp, Mixture)), None)
    if mixture and not mixture.is_plain:
        ours |= {"router": mixture.router, "experts": mixture.form}
    transformer = _defaults(table) | family.transformer_config() | table | dtypes | ours
    transformer["activation_func"] = getattr(F, transformer["activation_func"])
    optimizer = {"log_num_zeros_in_grad": False} | table | dtypes | {"min_lr": config.train.min_lr}
    ddp = {
        "grad_reduce_in_fp32": True,
        # in the background of the backward pass, except for sums in a given order
        "overlap_grad_reduce": torch.cuda.is_available() and not config.train.reduction_leaves,
    } | table
    return MegatronConfig(
        NetworkConfig(**_fields_of(NetworkConfig, transformer)),
        OptimizerConfig(**_fields_of(OptimizerConfig, optimizer)),
        DistributedDataParallelConfig(**_fields_of(DistributedDataParallelConfig, ddp)),
    )


def _context(config: Config, family: Family) -> int:
    """Return the engine's context length."""
    return config.sglang.get("context_length") or family.max_sequence_length


def _as_the_engine(config: Config, family: Family) -> dict[str, int]:
    """Return the fields of :class:`NetworkConfig` by which sums have the engine's reduction order."""
    backend = shared_backend(config.sglang.get("attention_backend"), family.layers[0].attention.head_dim)
    return {
        "partial_sums": config.sum_terms,
        "split_keys": part_length(_context(config, family)) if backend == SPLIT_KEYS else 0,
        "expert_partial_sums": config.sglang.get("ep_size", 1),
    }


def _defaults(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return values for TransformerConfig fields that the user left out and whose own default does not fit."""
    on_cpu, local = not torch.cuda.is_available(), table["transformer_impl"] == "local"
    virtual = table.get("virtual_pipeline_model_parallel_size")
    return {
        # the loss of a step is a plain sum: Megatron must not divide by micro-batches, data- or context-parallel size
        "calculate_per_token_loss": True,
        "use_cpu_initialization": on_cpu,
        # every weight comes from a checkpoint
        **dict.fromkeys(("init_method", "output_layer_init_method", "embedding_init_method"), lambda weight: weight),
        "gradient_accumulation_fusion": not on_cpu,
        # these need Apex or Transformer Engine
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        # The local layers' activation is a module of its own. Megatron's fused one would be compiled at the first step,
        # and takes as long.
        "use_te_activation_func": local,
        "bias_activation_fusion": not local,
        "moe_grouped_gemm": not local,
        "cuda_graph_modules": [],  # the default is a deprecated name of it, of which Megatron warns
        "moe_token_dispatcher_type": "alltoall",
        "moe_aux_loss_coeff": 0.0,
        # Batched point-to-point calls carry no tags: with two messages in flight between the same two ranks, which
        # interleaved stages have, gloo may deliver the wrong one.
        **({"batch_p2p_comm": False, "overlap_p2p_comm": True} if on_cpu and virtual else {}),
    }


def _with_virtual_stages(table: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    table = dict(table)
    per_stage = table.pop(LAYERS_PER_VIRTUAL_STAGE, None)
    if per_stage is None:
        return table
    stages = table.get("pipeline_model_parallel_size", 1)
    if per_stage <= 0 or num_layers % (stages * per_stage):
        raise ValueError(
            f"{LAYERS_PER_VIRTUAL_STAGE} = {per_stage} does not divide the {num_layers} layers over {stages} stages"
        )
    return table | {"virtual_pipeline_model_parallel_size": num_layers // stages // per_stage}


def _refuse_unsupported(table: Mapping[str, Any]) -> None:
    if table.get("moe_aux_loss_coeff"):
        raise ValueError(
            "moe_aux_loss_coeff must be 0: Megatron scales the auxiliary loss by its own token counts, which does not "
            "fit a loss that is a sum over globally weighted tokens"
        )
    if table.get("moe_router_load_balancing_type") == "quantile_balancing":
        raise ValueError(
            "moe_router_load_balancing_type must not be 'quantile_balancing': its bias for every expert is neither in "
            "checkpoints nor in the engine's weights"
        )
    if table["transformer_impl"] == "local":
        refused = [key for key in UNSUPPORTED_BY_LOCAL_EXPERTS if table.get(key)]
        if table.get("moe_token_dispatcher_type", "alltoall") != "alltoall":
            refused.append("moe_token_dispatcher_type")
        if refused:
            raise ValueError(f"not supported with transformer_impl 'local', leave them out: {', '.join(refused)}")
    if table["transformer_impl"] == "transformer_engine" and not torch.cuda.is_available():
        raise ValueError("transformer_impl: Transformer Engine needs a GPU, and there is none; set 'local'")
    if table.get("use_precision_aware_optimizer"):
        raise ValueError(
            "use_precision_aware_optimizer must be false: torch's Adam makes the updates, and its state is fp32"
        )
    missing = {"layernorm", "moe_act", "mla_up_proj"} & set(table.get("recompute_modules") or ())
    if missing and not random.HAVE_TE:
        names = ", ".join(sorted(missing))
        raise ValueError(f"recompute_modules: {names} cannot be recomputed without Transformer Engine")


def _refuse_unsupported_blocks(table: Mapping[str, Any], layers: Sequence[Layer]) -> None:
    """Transformer Engine's layers have what a plain decoder has; its modules would ignore the rest. Under context
    parallelism attention is our own."""
    if table["transformer_impl"] != "transformer_engine":
        return
    own_attention = table.get("context_parallel_size", 1) > 1
    for number, layer in enumerate(layers):
        a, rope, mlp = layer.attention, layer.attention.rope, layer.mlp
        of_attention = {
            "rotary positions of part of a head, of neighbours or with a factor": rope is not None
            and (rope.interleaved or rope.attention_factor != 1 or rope.rotary_dim != a.head_dim),
            "a window, a soft-cap, sinks or another scale": bool(a.window or a.softcap or a.sinks or a.scale),
        }
        found = ({} if own_attention else of_attention) | {
            "a norm over all heads": a.qk_norm == "width",
            "other norms": layer.norms != Norms(),
            "another router or other experts": isinstance(mlp, Mixture) and not mlp.is_plain,
            "an activation other than silu": isinstance(mlp, Mlp) and mlp.activation != "silu",
        }
        if names := [name for name, has in found.items() if has]:
            raise ValueError(
                f"transformer_impl: layer {number} of this model has {'; '.join(names)}, which Transformer Engine's "
                "layers do not; set 'local'"
            )


def _fields_of(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}
