"""Layers of experts of several models: SGLang's, the trainer's and transformers', with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor

from miles_spmd.models.blocks.experts import SWIGLU, ClampedSwiGLU, Experts, Router

E, K, HIDDEN, WIDTH, SHARED, TOKENS = 8, 2, 64, 32, 64, 24
COMMON = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
DEEPSEEK = {
    "n_routed_experts": E,
    "num_experts_per_tok": K,
    "moe_intermediate_size": WIDTH,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.5,
}


class Kind(NamedTuple):
    """One model's layer of experts. Modules are named ``module:class``."""

    config: transformers.PretrainedConfig
    engine: str
    theirs: str
    router: Router
    experts: Experts = SWIGLU
    shared: str = ""  # the name of shared experts, in both
    gate: str = "gate"  # of the router's weight, in both


def kinds() -> dict[str, Kind]:
    sigmoid = {"scores": "sigmoid", "bias": True, "normalize": True}
    grouped = {"groups": 4, "groups_per_token": 2, "best_of_group": 2}
    return {
        "qwen2_moe": Kind(
            transformers.Qwen2MoeConfig(
                **COMMON,
                num_experts=E,
                num_experts_per_tok=K,
                moe_intermediate_size=WIDTH,
                shared_expert_intermediate_size=SHARED,
            ),
            "sglang.srt.models.qwen2_moe:Qwen2MoeSparseMoeBlock",
            "qwen2_moe:Qwen2MoeSparseMoeBlock",
            Router(E, K),
            shared="shared_expert",
        ),
        "deepseek_v3": Kind(
            transformers.DeepseekV3Config(
                **COMMON,
                **DEEPSEEK,
                n_group=4,
                topk_group=2,
                norm_topk_prob=True,
                topk_method="noaux_tc",
                scoring_func="sigmoid",
            ),
            "sglang.srt.models.deepseek_v2:DeepseekV2MoE",
            "deepseek_v3:DeepseekV3MoE",
            Router(E, K, **sigmoid, **grouped, scale=2.5, logit_dtype="fp32"),
            shared="shared_experts",
        ),
        "glm4_moe": Kind(
            transformers.Glm4MoeConfig(**COMMON, **DEEPSEEK, n_group=1, topk_group=1, norm_topk_prob=True),
            "sglang.srt.models.glm4_moe:Glm4MoeSparseMoeBlock",
            "glm4_moe:Glm4MoeMoE",
            Router(E, K, **sigmoid, scale=2.5, logit_dtype="fp32"),
            shared="shared_experts",
        ),
        "minimax_m2": Kind(
            transformers.MiniMaxM2Config(
                **COMMON,
                num_local_experts=E,
                num_experts_per_tok=K,
                intermediate_size=WIDTH,
                scoring_func="sigmoid",
                use_routing_bias=True,
            ),
            "sglang.srt.models.minimax_m2:MiniMaxM2MoE",
            "minimax_m2:MiniMaxM2SparseMoeBlock",
            Router(E, K, **sigmoid),
        ),
        "gpt_oss": Kind(
            transformers.GptOssConfig(
                **COMMON,
                num_local_experts=E,
                num_experts_per_tok=K,
                intermediate_size=WIDTH,
                swiglu_limit=7.0,
                dtype=torch.float32,
            ),
            "sglang.srt.models.gpt_oss:GptOssSparseMoeBlock",
            "gpt_oss:GptOssMLP",
            Router(E, K, softmax_first=False, logit_bias=True),
            Experts(ClampedSwiGLU(), bias=True, interleaved=True),
            gate="router",
        ),
    }


def weights(kind: Kind) -> dict[str, Tensor]:
    """Return the whole layer's weights, fp32: those of gate and up as one expert's rows."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    found = {
        "router": random(E, HIDDEN) * 4,
        "gate_up": random(E, 2 * WIDTH, HIDDEN) * 4,  # beyond the limit of gpt-oss, too
        "down": random(E, HIDDEN, WIDTH) * 2,
    }
    if kind.router.bias:
        found["correction"] = random(E)
    if kind.router.logit_bias:
        found["router_bias"] = random(E)
    if kind.experts.bias:
        found |= {"gate_up_bias": random(E, 2 * WIDTH), "down_bias": random(E, HIDDEN)}
    if kind.shared:
        found |= {"shared_gate_up": random(2, SHARED, HIDDEN) * 2, "shared_down": random(HIDDEN, SHARED) * 2}
    if kind.shared == "shared_expert":
        found["shared_gate"] = random(1, HIDDEN)
    return found


def hidden_states() -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))


def output_gradient() -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2))


# --- transformers -----------------------------------------------------------------------------------------------------


def transformers_result(kind: Kind) -> dict[str, Tensor]:
    """Return the output and the gradients of hidden states and of weights, by the names of :func:`weights`."""
    module, name = kind.theirs.split(":")
    package = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=[name])
    kind.config._experts_implementation = "eager"
    layer, own = getattr(package, name)(kind.config), weights(kind)
    gate, experts = getattr(layer, kind.gate), layer.experts
    turned = kind.experts.bias  # gpt-oss has [in, out]
    leaves = {
        "router": gate.weight,
        "gate_up": experts.gate_up_proj,
        "down": experts.down_proj,
    }
    if kind.router.logit_bias:
        leaves["router_bias"] = gate.bias
    if turned:
        leaves |= {"gate_up_bias": experts.gate_up_proj_bias, "down_bias": experts.down_proj_bias}
    with torch.no_grad():
        for key, leaf in leaves.items():
            leaf.copy_(own[key].mT if turned and key in ("gate_up", "down") else own[key])
        if kind.router.bias:
            buffers = dict(layer.named_buffers())
            (correction,) = (b for n, b in buffers.items() if n.endswith("e_score_correction_bias"))
            correction.copy_(own["correction"])
    if kind.shared:
        shared = getattr(layer, kind.shared)
        leaves |= {"shared_down": shared.down_proj.weight}
        with torch.no_grad():
            for side, projection in enumerate((shared.gate_proj, shared.up_proj)):
                projection.weight.copy_(own["shared_gate_up"][side])
            shared.down_proj.weight.copy_(own["shared_down"])
            if "shared_gate" in own:
                layer.shared_expert_gate.weight.copy_(own["shared_gate"])
                leaves["shared_gate"] = layer.shared_expert_gate.weight
    hidden = hidden_states().requires_grad_()
    out = layer(hidden[None])
    out = (out[0] if isinstance(out, tuple) else out).view(TOKENS, HIDDEN)
    out.backward(output_gradient())
    found = {"output": out.detach(), "hidden": hidden.grad} | {key: leaf.grad for key, leaf in leaves.items()}
    for key in ("gate_up", "down") if turned else ():
        found[key] = found[key].mT
    if kind.shared:
        found["shared_gate_up"] = torch.stack((shared.gate_proj.weight.grad, shared.up_proj.weight.grad))
    return found


# --- SGLang -----------------------------------------------------------------------------------------------------------


def build_engine_layer(
    kind: Kind, folder: str, size: int, sum_terms: int, experts_on: int | None = None
) -> torch.nn.Module:
    """Build SGLang's layer on the ranks of an engine of ``size`` ranks, which have whole experts unless ``experts_on``
    is 1. Returns a model that has it as ``mlp``."""
    from sglang.srt.distributed import bootstrap
    from sglang.srt.server_args import set_global_server_args_for_scheduler

    from miles_spmd.generation.sglang import process_groups
    from miles_spmd.generation.sglang.invariant_layers import invariant_layers
    from miles_spmd.generation.sglang.server_args import build_server_args
    from miles_spmd.models import load_family
    from miles_spmd.platform.cpu import sglang_shim

    sglang_shim.adapt()
    ep_size = experts_on or size
    args = build_server_args(folder, "float32", 64, {"tp_size": size, "ep_size": ep_size})
    set_global_server_args_for_scheduler(args)
    process_groups.join(size)
    bootstrap.init_distributed_environment(backend="gloo", local_rank=0)
    bootstrap.initialize_model_parallel(tensor_model_parallel_size=size, expert_model_parallel_size=ep_size)
    module, name = kind.engine.split(":")
    model = torch.nn.Module()
    with invariant_layers(True, load_family(folder), sum_terms):
        model.mlp = getattr(__import__(module, fromlist=[name]), name)(config=kind.config, layer_id=0)
    return model


def _fill_engine(kind: Kind, layer: Any, rank: int, size: int) -> None:
    own, gate, experts = weights(kind), getattr(layer, kind.gate), layer.experts
    local = slice(*(E * (experts.moe_ep_rank + side) // experts.moe_ep_size for side in (0, 1)))
    split = kind.experts.interleaved, experts.moe_tp_rank, experts.moe_tp_size
    parts = {gate.weight: own["router"]}
    parts[experts.w13_weight] = _share_of_width(own["gate_up"][local], *split).flatten(1, 2)
    parts[experts.w2_weight] = own["down"][local].chunk(split[2], 2)[split[1]]
    if kind.router.bias:
        parts[layer.topk.topk_config.correction_bias] = own["correction"]
    if kind.router.logit_bias:
        parts[gate.bias] = own["router_bias"]
    if kind.experts.bias:
        parts[experts.w13_weight_bias] = _share_of_width(own["gate_up_bias"][local], *split).flatten(1, 2)
        parts[experts.w2_weight_bias] = own["down_bias"][local]
    if kind.shared:
        shared = getattr(layer, kind.shared)
        parts[shared.gate_up_proj.weight] = own["shared_gate_up"].chunk(size, 1)[rank].flatten(0, 1)
        parts[shared.down_proj.weight] = own["shared_down"].chunk(size, 1)[rank]
    if "shared_gate" in own:
        parts[layer.shared_expert_gate.weight] = own["shared_gate"]
    for parameter, value in parts.items():
        assert parameter.shape == value.shape
        parameter.data.copy_(value)


def _share_of_width(rows: Tensor, interleaved: bool, rank: int, size: int) -> Tensor:
    """Return a rank's share of the rows of gate and up of every expert, which get a dimension of their own."""
    sides, axis = ((WIDTH, 2), 1) if interleaved else ((2, WIDTH), 2)
    return rows.unflatten(1, sides).chunk(size, axis)[rank]


# --- the trainer ------------------------------------------------------------------------------------------------------


def trainer_layer(kind: Kind, layout: dict[str, Any], engine_size: int) -> tuple[Any, Any]:
    """Return this rank's layer, with the engine's reduction order unless ``engine_size`` is 0, and its coordinates."""
    from miles_spmd.training import parallel
    from miles_spmd.training.experts import MoE
    from miles_spmd.training.megatron_config import NetworkConfig

    tp = layout.get("tensor_model_parallel_size", 1)
    config = NetworkConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=WIDTH,
        num_attention_heads=4,
        num_moe_experts=E,
        moe_ffn_hidden_size=WIDTH,
        moe_router_topk=K,
        moe_router_load_balancing_type="none",
        moe_router_pre_softmax=True,
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="alltoall",
        moe_shared_expert_intermediate_size=SHARED if kind.shared else None,
        moe_shared_expert_gate=kind.shared == "shared_expert",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        invariant=engine_size > 0,
        partial_sums=max(tp, engine_size),
        expert_partial_sums=max(1, engine_size),
        router=kind.router,
        experts=kind.experts,
        **layout,
    )
    where = parallel.initialize(config, 0)
    layer = MoE(config)
    _fill_trainer(kind, layer, where)
    return layer, where


def _trainer_parts(layer: Any, own: Mapping[str, Any], where: Any) -> dict[str, tuple[Any, Any]]:
    """Return the parameters of a rank and its parts of whole tensors, by the names of :func:`weights`."""
    each = E // where.ep_size
    local = slice(where.ep_rank * each, (where.ep_rank + 1) * each)
    experts, parts = layer.experts, {"router": (layer.router.weight, own["router"])}

    split = experts.form.interleaved, where.etp_rank, where.etp_size
    parts["gate_up"] = (experts.gate_up, _share_of_width(own["gate_up"][local], *split))
    parts["down"] = (experts.down, own["down"][local].chunk(where.etp_size, 2)[where.etp_rank])
    if experts.form.bias:
        parts["gate_up_bias"] = (experts.gate_up_bias, _share_of_width(own["gate_up_bias"][local], *split))
        parts["down_bias"] = (experts.down_bias, own["down_bias"][local])
    if layer.router.form.bias:
        parts["correction"] = (layer.router.expert_bias, own["correction"])
    if layer.router.form.logit_bias:
        parts["router_bias"] = (layer.router.bias, own["router_bias"])
    if layer.shared_experts is not None:
        shared = layer.shared_experts
        rows = own["shared_gate_up"].chunk(where.tp_size, 1)[where.tp_rank].flatten(0, 1)
        parts["shared_gate_up"] = (shared.linear_fc1.weight, rows)
        parts["shared_down"] = (shared.linear_fc2.weight, own["shared_down"].chunk(where.tp_size, 1)[where.tp_rank])
        if shared.gate_weight is not None:
            parts["shared_gate"] = (shared.gate_weight, own["shared_gate"])
    return parts


def _fill_trainer(kind: Kind, layer: Any, where: Any) -> None:
    for parameter, value in _trainer_parts(layer, weights(kind), where).values():
        assert parameter.shape == value.shape
        parameter.data.copy_(value)


# --- on a rank --------------------------------------------------------------------------------------------------------


class Compared(NamedTuple):
    mismatches: int  # numbers of the output that differ from the engine's
    batches: int  # numbers that differ where the engine has other tokens beside a token, or none
    errors: dict[str, float]  # of output and gradients from transformers', relative


def compare(name: str, folder: str, layout: dict[str, Any], engine_size: int) -> Compared:
    """Compare the engine's layer with the trainer's, and this one with transformers'."""
    from miles_spmd.generation.sglang import process_groups
    from miles_spmd.generation.sglang.expert_layers import describe

    kind, hidden = kinds()[name], hidden_states()
    tp = layout.get("tensor_model_parallel_size", 1)
    try:
        model = build_engine_layer(kind, folder, engine_size, max(tp, engine_size))
        describe(model)
        engine = model.mlp
        assert engine.topk.form == kind.router
        assert engine.experts.form == kind.experts
        _fill_engine(kind, engine, dist.get_rank() % engine_size, engine_size)
        with torch.inference_mode():
            expected = engine(hidden.clone())
            some = [engine(hidden[a:b].clone()) for a, b in ((0, 1), (1, 4), (4, TOKENS))]
    finally:
        process_groups.leave()
    out, own, errors = _trained(kind, layout, engine_size)
    return Compared(int((out != expected[own]).sum()), int((torch.cat(some) != expected).sum()), errors)


def error_of_split_experts(name: str, folder: str) -> float:
    """Return how far an engine's output is from transformers' where all ranks have a part of every expert's width."""
    from miles_spmd.generation.sglang import process_groups
    from miles_spmd.generation.sglang.expert_layers import describe

    kind, size = kinds()[name], dist.get_world_size()
    try:
        model = build_engine_layer(kind, folder, size, size, experts_on=1)
        describe(model)
        _fill_engine(kind, model.mlp, dist.get_rank(), size)
        with torch.inference_mode():
            found = model.mlp(hidden_states())
    finally:
        process_groups.leave()
    expected = transformers_result(kind)["output"]
    return float((found - expected).norm() / expected.norm())


def errors_of(name: str, layout: dict[str, Any]) -> dict[str, float]:
    """Return how far the layer of a trainer without parity is from transformers'."""
    return _trained(kinds()[name], layout, 0)[2]


def _trained(kind: Kind, layout: dict[str, Any], engine_size: int) -> tuple[Tensor, slice, dict[str, float]]:
    """Run the trainer's layer forward and backward. Return the output of this rank's tokens, and which these are."""
    layer, where = trainer_layer(kind, layout, engine_size)
    each = TOKENS // where.tp_size
    scattered = layout.get("sequence_parallel", False)
    own = slice(where.tp_rank * each, (where.tp_rank + 1) * each) if scattered else slice(None)
    rows = hidden_states()[own, None].requires_grad_()
    out, _ = layer(rows)
    out.backward(output_gradient()[own, None])
    found = {"output": out.detach()[:, 0], "hidden": rows.grad[:, 0]}
    return found["output"], own, _errors(kind, layer, where, found, own)


def _errors(kind: Kind, layer: Any, where: Any, found: dict[str, Tensor], own: slice) -> dict[str, float]:
    from megatron.core import parallel_state

    exact = transformers_result(kind)
    pairs = {name: (value, exact[name][own]) for name, value in found.items()}
    replicas = dist.get_world_size() // where.tp_size  # with the same tokens
    for name, (parameter, expected) in _trainer_parts(layer, exact | {"correction": torch.zeros(E)}, where).items():
        if name == "correction":
            assert parameter.grad is None
            continue
        gradient = parameter.grad.clone()
        if name in ("gate_up", "down", "gate_up_bias", "down_bias"):  # of the tokens of all replicas
            dist.all_reduce(gradient, group=parallel_state.get_expert_data_parallel_group())
            expected = expected * replicas
        elif getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(gradient, group=layer.tp_group)
        pairs[name] = gradient, expected
    return {name: float((value - true).norm() / true.norm().clamp(min=1e-9)) for name, (value, true) in pairs.items()}


def write_config(folder: Path) -> str:
    """Write a configuration that SGLang's arguments can be built from; the layers get their own."""
    config = transformers.Qwen3Config(**COMMON, vocab_size=97, architectures=["Qwen3ForCausalLM"])
    config.save_pretrained(folder)
    return str(folder)
