"""What a Megatron rank and an SGLang rank hold, written down by hand: an oracle independent of the layouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from miles_spmd.models import Family, TensorLayout

State = Mapping[str, Tensor]


def megatron_names(
    family: Family, layers: range, experts: bool, first: bool = True, last: bool = True
) -> Iterator[str]:
    """Parameters of one rank under the local layer spec, by whole-model name."""
    if first:
        yield "embedding.word_embeddings.weight"
    for layer in layers:
        prefix = f"decoder.layers.{layer}."
        yield from (prefix + "input_layernorm.weight", prefix + "pre_mlp_layernorm.weight")
        yield from (f"{prefix}self_attention.{name}.weight" for name in ("linear_qkv", "linear_proj"))
        if family.layers[0].attention.qkv_bias:
            yield prefix + "self_attention.linear_qkv.bias"
        if family.layers[0].attention.qk_norm:
            yield from (f"{prefix}self_attention.{name}_layernorm.weight" for name in "qk")
        if experts:
            yield prefix + "mlp.router.weight"
        mlp = ("experts.gate_up", "experts.down") if experts else ("linear_fc1.weight", "linear_fc2.weight")
        yield from (f"{prefix}mlp.{name}" for name in mlp)
    if last:
        yield "decoder.final_layernorm.weight"
    if last and not (first and family.tied_embeddings):
        yield "output_layer.weight"


def sglang_names(family: Family, experts: bool) -> Iterator[str]:
    yield "model.embed_tokens.weight"
    for layer in range(family.num_layers):
        prefix = f"model.layers.{layer}."
        yield from (prefix + "input_layernorm.weight", prefix + "post_attention_layernorm.weight")
        yield from (prefix + "self_attn.qkv_proj.weight", prefix + "self_attn.o_proj.weight")
        if family.layers[0].attention.qkv_bias:
            yield prefix + "self_attn.qkv_proj.bias"
        if family.layers[0].attention.qk_norm:
            yield from (prefix + "self_attn.q_norm.weight", prefix + "self_attn.k_norm.weight")
        mlp = (
            ("gate.weight", "experts.w13_weight", "experts.w2_weight")
            if experts
            else ("gate_up_proj.weight", "down_proj.weight")
        )
        yield from (f"{prefix}mlp.{name}" for name in mlp)
    yield "model.norm.weight"
    if not family.tied_embeddings:
        yield "lm_head.weight"


def megatron_tensor(
    state: State,
    family: Family,
    name: str,
    rank: int,
    size: int,
    experts: range = range(0),
    etp_rank: int = 0,
    etp_size: int = 1,
) -> Tensor:
    """The local tensor of a Megatron parameter, cut from a whole checkpoint."""
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        output = name.startswith("output") and not family.tied_embeddings
        return vocabulary(state["lm_head.weight" if output else "model.embed_tokens.weight"], rank, size, 1)
    if name == "decoder.final_layernorm.weight":
        return state["model.norm.weight"]
    _, _, layer, module, rest = name.split(".", 4)
    hf = f"model.layers.{layer}."
    leaf = name.rpartition(".")[2]
    if module == "self_attention" and rest.startswith("linear_qkv."):
        groups = (
            state[f"{hf}self_attn.{part}_proj.{leaf}"].unflatten(0, (family.layers[0].attention.num_kv_heads, -1))
            for part in "qkv"
        )
        return torch.cat(list(groups), 1).flatten(0, 1).chunk(size)[rank]
    if rest.startswith("experts."):
        blocks = [f"{hf}mlp.experts.{expert}." for expert in experts]
        if rest == "experts.down":
            return torch.stack([state[block + "down_proj.weight"].chunk(etp_size, 1)[etp_rank] for block in blocks])
        halves = [[state[f"{block}{part}_proj.weight"] for part in ("gate", "up")] for block in blocks]
        return torch.stack([torch.stack([half.chunk(etp_size)[etp_rank] for half in pair]) for pair in halves])
    if rest == "linear_fc2.weight":
        return state[hf + "mlp.down_proj.weight"].chunk(size, 1)[rank]
    if rest == "linear_fc1.weight":
        return torch.cat([state[f"{hf}mlp.{part}_proj.weight"].chunk(size)[rank] for part in ("gate", "up")])
    if rest == "linear_proj.weight":
        return state[hf + "self_attn.o_proj.weight"].chunk(size, 1)[rank]
    whole = {
        "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "self_attention.q_layernorm": "self_attn.q_norm",
        "self_attention.k_layernorm": "self_attn.k_norm",
        "mlp.router": "mlp.gate",
    }
    return state[f"{hf}{whole[name.removesuffix('.weight').split('.', 3)[3]]}.weight"]


def sglang_tensor(state: State, family: Family, name: str, rank: int, size: int) -> Tensor:
    """The local tensor of an SGLang parameter."""
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return vocabulary(state[name], rank, size, 64)
    prefix, _, last = name.rpartition("mlp.") if "mlp." in name else name.rpartition("self_attn.")
    if last.startswith("qkv_proj"):
        leaf = last.rpartition(".")[2]
        replicas = max(1, size // family.layers[0].attention.num_kv_heads)
        q, k, v = (state[f"{prefix}self_attn.{part}_proj.{leaf}"] for part in "qkv")
        return torch.cat([q.chunk(size)[rank], *(t.chunk(size // replicas)[rank // replicas] for t in (k, v))])
    if last in ("o_proj.weight", "down_proj.weight"):
        return state[name].chunk(size, 1)[rank]

    def gate_up(block: str) -> Tensor:
        return torch.cat([state[f"{block}{part}_proj.weight"].chunk(size)[rank] for part in ("gate", "up")])

    experts = [f"{prefix}mlp.experts.{expert}." for expert in range(family.config.get("num_local_experts", 0))]
    if last == "gate_up_proj.weight":
        return gate_up(prefix + "mlp.")
    if last == "experts.w13_weight":
        return torch.stack([gate_up(block) for block in experts])
    if last == "experts.w2_weight":
        return torch.stack([state[block + "down_proj.weight"].chunk(size, 1)[rank] for block in experts])
    return state[name]


def vocabulary(table: Tensor, rank: int, size: int, multiple: int) -> Tensor:
    """Rows shared out evenly after zeros have rounded them up to ``multiple`` and to the number of ranks."""
    rows = -(-table.shape[0] // multiple) * multiple
    rows = -(-rows // size) * size
    return torch.cat([table, table.new_zeros(rows - table.shape[0], table.shape[1])]).chunk(size)[rank]


class Trainer(NamedTuple):
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1


def trainer_rank(family: Family, state: State, where: Trainer) -> tuple[dict[str, Tensor], list[TensorLayout]]:
    """This rank's tensors, in Megatron's rank order: tensor parallel fastest, then data parallel, then pipeline."""
    rank, world = dist.get_rank(), dist.get_world_size()
    tp_rank, stage = rank % where.tp, rank * where.pp // world
    experts = len({n.split(".")[5] for n in family.checkpoint_tensors() if ".experts." in n})
    ep_rank = (rank % (world // where.pp)) % where.ep
    mine = range(ep_rank * experts // where.ep, (ep_rank + 1) * experts // where.ep)
    chunks, per_chunk = where.pp * where.vpp, family.num_layers // (where.pp * where.vpp)
    weights: dict[str, Tensor] = {}
    for chunk in range(stage, chunks, where.pp):
        layers = range(chunk * per_chunk, (chunk + 1) * per_chunk)
        for name in megatron_names(family, layers, experts > 0, first=chunk == 0, last=chunk == chunks - 1):
            weights[name] = megatron_tensor(state, family, name, tp_rank, where.tp, mine).clone()
    place = {"tp_rank": tp_rank, "tp_size": where.tp, "ep_rank": ep_rank, "ep_size": where.ep}
    return weights, [TensorLayout(n, family.megatron_layout(n, tuple(t.shape), **place)) for n, t in weights.items()]
