"""Outputs of SGLang's modules while a request runs, by the names under which they are compared with the trainer's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from miles_spmd.generation.sglang.engine import SglangEngine
from miles_spmd.invariant.operator_outputs import FIRST, LAST, OperatorOutputs, hooked

PARTS = {
    "input_layernorm": "input norm",
    "self_attn.qkv_proj": "query, key and value",
    "self_attn.q_norm": "query norm",
    "self_attn.k_norm": "key norm",
    "self_attn.attn": "attention",
    "post_attention_layernorm": "MLP norm",
    "mlp.gate_up_proj": "gate and up projection",
    "mlp.act_fn": "SwiGLU",
    "mlp.topk": "router",  # its weights, in descending order
}
SUMMED_LATER = {  # partial sums with several ranks, so not comparable before the all-reduce
    "self_attn.o_proj": "output projection",
    "mlp.down_proj": "down projection",
    "mlp.experts": "experts",
}


@contextmanager
def traced(engine: SglangEngine) -> Iterator[OperatorOutputs]:
    """Record the outputs of the engine's modules inside this context. The engine runs without CUDA graphs, because
    their replay calls no modules."""
    model: Any = engine._model.model
    modules = {FIRST: model.embed_tokens, LAST: model.norm}
    parts = PARTS | (SUMMED_LATER if engine.size == 1 else {})
    for number, layer in enumerate(model.layers):
        own = dict(layer.named_modules())
        modules |= {f"layer {number}, {part}": own[name] for name, part in parts.items() if name in own}
    positions = torch.empty(0)

    def keep_positions(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal positions
        positions = inputs[1]

    handle = model.register_forward_pre_hook(keep_positions)
    try:
        with hooked(modules, lambda rows: positions, {}) as found:
            yield found
    finally:
        handle.remove()
