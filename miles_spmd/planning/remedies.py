"""What to change where memory does not suffice."""

from __future__ import annotations

from miles_spmd.config import Config
from miles_spmd.config.checks import settings
from miles_spmd.types.phase import Phase


def remedies(config: Config, doing: Phase | str) -> str:
    """Return a sentence of settings, with their present values, that need less memory for what a rank is ``doing``; the
    most effective first."""
    s = settings(config)
    activations = [f"lower train.max_tokens_per_gpu ({config.train.max_tokens_per_gpu})"]
    if s["recompute_granularity"] != "full":
        activations.append('set megatron.recompute_granularity="full" with recompute_method and recompute_num_layers')
    states = []
    if not s["use_distributed_optimizer"]:
        states.append("set megatron.use_distributed_optimizer=true")
    states.append(f"raise megatron.tensor_model_parallel_size ({s['tensor_model_parallel_size']})")
    engine = [f"lower sglang.{name} ({s[name]})" for name in ("mem_fraction_static", "max_total_tokens") if s[name]]
    engine = engine or ["set sglang.max_total_tokens or mem_fraction_static"]
    cut = [f"raise sglang.tp_size ({s['tp_size']})"]
    colocated = not config.rollout.rollout_num_gpus
    releases = ['set rollout.offload_rollout="all"'] if colocated and config.rollout.offload_rollout != "all" else []
    moves_out = ["set train.offload_train=true"] if colocated and not config.train.offload_train else []
    batches = [
        f"{'lower' if s[name] else 'set'} sglang.{name}" + (f" ({s[name]})" if s[name] else "")
        for name in ("max_running_requests", "chunked_prefill_size")
    ]
    match doing:
        case Phase.TRAIN | Phase.LOG_PROBS | "training":
            changes = [*activations, *releases, *states]
        case Phase.ROLLOUT:
            changes = [*batches, *engine, *moves_out]
        case Phase.REFIT:
            changes = [*engine, *moves_out, *cut, *states]
        case "generating":
            changes = [*moves_out, *cut, *states]
        case _:
            changes = [*states, *engine, *moves_out]
    return f"What helps: {'; '.join(changes)}"
