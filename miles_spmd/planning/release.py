"""What an engine releases while the trainer works on the device that they share, and what to change where memory does
not suffice."""

from __future__ import annotations

from enum import StrEnum

from miles_spmd.config import Config
from miles_spmd.config.checks import settings
from miles_spmd.planning.memory_estimate import MemoryEstimate
from miles_spmd.types.engine_group import JUDGE, POLICY
from miles_spmd.types.phase import Phase

GIB = 2**30
SPARE = 2 * GIB  # left out of every plan: fragmentation, workspaces of libraries
CONTEXT = 3 * GIB  # assumed for CUDA, NCCL and the engine's graphs before they can be measured


class Release(StrEnum):
    """From the least to the most. To resume released memory takes 2 ms for each GiB."""

    NOTHING = "nothing"
    KV_CACHE = "kv_cache"  # and CUDA graphs
    ALL = "all"


ORDER = list(Release)


def sized(nbytes: int) -> str:
    """Return a size as text."""
    return f"{nbytes / GIB:,.4g} GiB" if nbytes > GIB / 100 else f"{nbytes / 2**20:,.3g} MiB"


def with_margin(working: int, allowance: float) -> int:
    """Return the bytes to leave to a trainer that is expected to need ``working``, with ``train.memory_allowance`` on
    top: running out of memory ends the run, because an engine cannot release more in the middle of a step."""
    return int(working * (1 + allowance)) + SPARE


def choose_release(config: Config, needed: int, room: int, kv_cache: int) -> Release:
    """Return the least that leaves a trainer ``needed`` bytes, where ``room`` bytes are free beside the engine and
    ``kv_cache`` more without its cache; or what ``rollout.offload_rollout`` sets. Where rollouts lag behind, engines
    keep their weights."""
    if config.rollout.offload_rollout != "auto":
        choice = Release(config.rollout.offload_rollout)
    elif needed <= room:
        choice = Release.NOTHING
    else:
        choice = Release.KV_CACHE if needed <= room + kv_cache else Release.ALL
    lags = config.refit.update_weights_interval > 1
    return Release.KV_CACHE if lags and choice is Release.ALL else choice


def planned_release(config: Config, plan: MemoryEstimate, kv_cache: int, device: int) -> Release:
    """Return the expected choice for an engine with ``kv_cache`` bytes of cache on a device of ``device`` bytes."""
    room = device - CONTEXT - plan.trainer - plan.engine_weights - kv_cache
    return choose_release(config, with_margin(plan.working, config.train.memory_allowance), room, kv_cache)


def peaks(plan: MemoryEstimate, kv_cache: int, release: Release) -> tuple[int, int]:
    """Return the peaks of a device in bytes: while the trainer works, while the engine generates."""
    kept = {Release.NOTHING: plan.engine_weights + kv_cache, Release.KV_CACHE: plan.engine_weights, Release.ALL: 0}
    beside = kept[release] if plan.colocated else 0
    return CONTEXT + plan.trainer + plan.working + beside, CONTEXT + plan.generating + kv_cache


def remedies(config: Config, doing: Phase | str, group: str = POLICY) -> str:
    """Return a sentence of settings, with their present values, that need less memory for what a rank of ``group`` is
    ``doing``; the most effective first."""
    if group == JUDGE:
        return (
            f"What helps: in reward.judge_sglang ({config.reward.judge_sglang}) raise tp_size, and lower "
            "mem_fraction_static, max_total_tokens or max_running_requests"
        )
    s = settings(config)
    activations = [f"lower train.max_tokens_per_gpu ({config.train.max_tokens_per_gpu})"]
    if s["recompute_granularity"] != "full":
        activations.append('set megatron.recompute_granularity="full" with recompute_method and recompute_num_layers')
    states = []
    if not s["use_distributed_optimizer"]:
        states.append("set megatron.use_distributed_optimizer=true")
    states.append(f"raise megatron.tensor_model_parallel_size ({s['tensor_model_parallel_size']})")
    sums = [f"lower train.reduction_leaves ({config.train.reduction_leaves})"] if config.train.reduction_leaves else []
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
            changes = [*activations, *releases, *states, *sums]
        case Phase.ROLLOUT:
            changes = [*batches, *engine, *moves_out]
        case Phase.REFIT:
            changes = [*engine, *moves_out, *cut, *states]
        case "generating":
            changes = [*moves_out, *cut, *states]
        case _:
            changes = [*states, *engine, *moves_out]
    return f"What helps: {'; '.join(changes)}"
