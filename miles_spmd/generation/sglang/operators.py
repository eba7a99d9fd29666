"""What SGLang's modules put out while a request is answered."""

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
    "mlp.topk": "router",  # weights, the largest first
}
SUMMED_LATER = {  # over ranks, if several
    "self_attn.o_proj": "output projection",
    "mlp.down_proj": "down projection",
    "mlp.experts": "experts",
}


@contextmanager
def traced(engine: SglangEngine) -> Iterator[OperatorOutputs]:
    """Without CUDA graphs: what they replay calls no module."""
    model: Any = engine._model.model
    modules = {FIRST: model.embed_tokens, LAST: model.norm}
    parts = PARTS | (SUMMED_LATER if engine.tp_size == 1 else {})
    for number, layer in enumerate(model.layers):
        own = dict(layer.named_modules())
        modules |= {f"layer {number}, {part}": own[name] for name, part in parts.items() if name in own}
    places = torch.empty(0)

    def remember(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal places
        places = inputs[1]

    handle = model.register_forward_pre_hook(remember)
    try:
        with hooked(modules, lambda rows: places, {}) as found:
            yield found
    finally:
        handle.remove()
