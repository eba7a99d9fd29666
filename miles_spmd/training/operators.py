"""What Megatron's modules put out while a sequence is scored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor

from miles_spmd.invariant.operators import FIRST, LAST, Trace, hooked
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


def trace(network: Network, tokens: list[int]) -> Trace:
    """Under pipeline parallelism of the layers that are here."""
    weights = np.ones(len(tokens), np.float32)
    with ExitStack() as stack:
        found = [stack.enter_context(_traced(unwrap(chunk), len(tokens))) for chunk in network._chunks]
        network.log_probs([[TrainSequence(np.asarray(tokens, np.int32), weights)]])
    return {name: rows for of_chunk in found for name, rows in of_chunk.items()}


@contextmanager
def _traced(model: PackedModel, tokens: int) -> Iterator[Trace]:
    modules: dict[str, torch.nn.Module] = {FIRST: model.embedding} if model.pre_process else {}
    for layer in model.decoder.layers:
        own = dict(layer.named_modules())
        number = layer.layer_number - 1
        modules |= {f"layer {number}, {part}": own[name] for name, part in PARTS.items() if name in own}
    if model.post_process:
        modules[LAST] = model.decoder.final_layernorm
    heads = model.config.num_attention_heads // model.config.num_query_groups

    def places(rows: Tensor) -> Tensor:
        """Behind the last attention there is no last token; a part of the stream only is of no use."""
        return torch.arange(len(rows) if len(rows) in (tokens, tokens - 1) else 0)

    def apart(rows: Tensor) -> Tensor:
        """Queries, then keys, then values, which Megatron has group by group."""
        width = model.config.kv_channels
        by_group = rows.view(len(rows), -1, heads + 2, width)
        return torch.cat([part.flatten(1) for part in by_group.split([heads, 1, 1], 2)], 1)

    def weights(rows: Tensor) -> Tensor:
        """Of the chosen experts, the largest first."""
        return rows.topk(model.config.moe_router_topk).values

    with hooked(modules, places, {"query, key and value": apart, "router": weights}) as found:
        yield found
