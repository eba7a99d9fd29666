"""The outputs of Megatron's modules while a sequence is scored, by the names that both sides share."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack

import numpy as np
import torch
from torch import Tensor

from miles_spmd.invariant.operator_outputs import FIRST, LAST, OperatorOutputs, hooked
from miles_spmd.training.model import PackedModel, unwrap
from miles_spmd.training.network import Network
from miles_spmd.types.train_sequence import TrainSequence

PARTS = {
    "input_layernorm": "input norm",
    "self_attention.linear_qkv": "query, key and value",
    "self_attention.q_layernorm": "query norm",
    "self_attention.k_layernorm": "key norm",
    "self_attention.core_attention": "attention",
    "self_attention.linear_proj": "output projection",
    "pre_mlp_layernorm": "MLP norm",
    "mlp.linear_fc1": "gate and up projection",
    "mlp.activation_func": "SwiGLU",
    "mlp.linear_fc2": "down projection",
    "mlp.router": "router",
    "mlp": "experts",  # which a dense engine does not have
}


def operator_outputs(network: Network, tokens: list[int]) -> OperatorOutputs:
    """Return the outputs of every operator of this pipeline stage while ``tokens`` are scored."""
    weights = np.ones(len(tokens), np.float32)
    with ExitStack() as stack:
        found = [stack.enter_context(_recorded(unwrap(chunk), len(tokens))) for chunk in network._chunks]
        network.log_probs([[TrainSequence(np.asarray(tokens, np.int32), weights)]])
    return {name: rows for of_chunk in found for name, rows in of_chunk.items()}


def _recorded(model: PackedModel, tokens: int) -> AbstractContextManager[OperatorOutputs]:
    modules: dict[str, torch.nn.Module] = {FIRST: model.embedding} if model.pre_process else {}
    for layer in model.decoder.layers:
        own = dict(layer.named_modules())
        number = layer.layer_number - 1
        modules |= {f"layer {number}, {part}": own[name] for name, part in PARTS.items() if name in own}
    if model.post_process:
        modules[LAST] = model.decoder.final_layernorm
    heads = model.config.num_attention_heads // model.config.num_query_groups

    def places(rows: Tensor) -> Tensor:
        """Return the rows' places in the sequence. After the last attention the last token, which predicts nothing, is
        missing; outputs of only a part of the stream are left out."""
        return torch.arange(len(rows) if len(rows) in (tokens, tokens - 1) else 0)

    def queries_keys_values(rows: Tensor) -> Tensor:
        """Return all queries, then keys, then values, as engines order them; Megatron orders them group by group."""
        width = model.config.kv_channels
        by_group = rows.view(len(rows), -1, heads + 2, width)
        return torch.cat([part.flatten(1) for part in by_group.split([heads, 1, 1], 2)], 1)

    def weights(rows: Tensor) -> Tensor:
        """Return the weights of the chosen experts, the largest first."""
        return rows.topk(model.config.moe_router_topk).values

    return hooked(modules, places, {"query, key and value": queries_keys_values, "router": weights})
