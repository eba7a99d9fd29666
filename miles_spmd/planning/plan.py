"""The text of ``plan`` and ``--dry-run``: ranks, groups, batch schedule, memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil

from miles_spmd.config import Config
from miles_spmd.config.checks import settings
from miles_spmd.models import Family, load_family
from miles_spmd.planning.memory_estimate import (
    MOST_REQUESTS,
    STATIC_FRACTION,
    MemoryEstimate,
    checkpoint_bytes,
    estimate_judge,
    estimate_memory,
    needed_tokens,
)
from miles_spmd.planning.parallel_layout import Groups, ParallelLayout
from miles_spmd.planning.release import CONTEXT, GIB, Release, peaks, planned_release, remedies, sized
from miles_spmd.types.engine_group import JUDGE

MAX_RANKS = 16  # listed one by one
RELEASED = {
    Release.NOTHING: "nothing",
    Release.KV_CACHE: "KV cache and CUDA graphs",
    Release.ALL: "weights, KV cache and CUDA graphs",
}
KINDS = {
    "rl": "reinforcement learning",
    "sft": "supervised fine-tuning",
    "dpo": "preference optimisation",
    "rm": "reward modelling",
}


def describe_plan(config: Config, world_size: int, device_gib: float | None = None) -> str:
    """``config`` must have passed its checks for ``world_size``; ``device_gib`` is the memory of one GPU, if known.

    Raises what reading the checkpoint's config.json raises.
    """
    family = load_family(config.model.hf_checkpoint)
    layout = ParallelLayout.of(config, world_size)
    blocks = [
        _title(config, family),
        _ranks(layout, config.resilience.cells),
        _groups(layout, family),
        _schedule(config, layout),
        _memory(config, layout, estimate_memory(config, family, layout), device_gib),
    ]
    if layout.judge_num_gpus:
        blocks.append(_judge(config, layout, device_gib))
    return "\n\n".join("\n".join(block) for block in blocks)


def _title(config: Config, family: Family) -> Iterator[str]:
    total, active = family.num_parameters(), family.num_active_parameters()
    sparse = f", {_count(active)} of them for each token" if active != total else ""
    yield f"{config.run.name}: {KINDS[config.run.mode]} of a {family.model_type} model"
    yield f"  {_count(total)} parameters{sparse}, {config.model.dtype}, from {config.model.hf_checkpoint}"
    yield f"  everything is written to {config.run_dir}"


def _ranks(layout: ParallelLayout, cells: int) -> Iterator[str]:
    axes = ["tp", "cp", "dp", "pp"] + (["etp", "ep", "edp"] if layout.ep > 1 else []) + ["engine"]
    axes += ["judge"] if layout.judge_num_gpus else []
    leaders = {group[0] for group in [*layout.engine_groups(), *layout.judge_groups()] if len(group) > 1}
    yield f"Ranks ({layout.world_size}{f' in each of {cells} cells' if cells > 1 else ''})"
    yield "  rank" + "".join(f"{axis:>8}" for axis in axes)
    shown = min(layout.world_size, MAX_RANKS)
    for rank in range(shown):
        where = layout.coordinates(rank)
        leader = "*" if rank in leaders else ""
        yield f"  {rank:>4}" + "".join(f"{where.get(axis, '-'):>8}" for axis in axes) + leader
    if leaders:
        yield "  * leads its engine"
    if shown < layout.world_size:
        yield f"  ... and {layout.world_size - shown} more"
    if layout.rollout_num_gpus:
        yield f"  disaggregated: {len(layout.trainer_ranks)} train, {len(layout.engine_ranks)} generate"
    if layout.second_num_gpus:
        first, last = layout.second_ranks[0], layout.second_ranks[-1]
        ranks = f"ranks {first} to {last} train" if first < last else f"rank {first} trains"
        yield f"  {ranks} a second policy, with engines of its own"
    if layout.judge_num_gpus:
        first, last = layout.judge_ranks[0], layout.judge_ranks[-1]
        yield f"  ranks {first} to {last} judge, and do nothing else" if first < last else f"  rank {first} only judges"


def _groups(layout: ParallelLayout, family: Family) -> Iterator[str]:
    yield "Groups"
    named = {"tensor": "tp", "context": "cp", "data": "dp", "pipeline": "pp"}
    if layout.ep > 1:
        named |= {"expert tensor": "etp", "expert": "ep", "expert data": "edp"}
    for name, axis in named.items():
        yield f"  {name:<14}{_listed(layout.groups(axis))}"
    yield f"  {'engines':<14}{_listed(layout.engine_groups())}"
    if layout.judge_num_gpus:
        yield f"  {'judges':<14}{_listed(layout.judge_groups())}"
    kv_heads = min(layer.attention.num_kv_heads for layer in family.layers)
    if layout.engine_tp > kv_heads:
        yield f"  {layout.engine_tp // kv_heads} ranks of an engine share each key-value head"


def _listed(groups: Groups) -> str:
    size = len(groups[0])
    text = f"{len(groups)} of {size}"
    if size == 1:
        return text
    shown = groups[: max(1, MAX_RANKS // size)]
    dots = " ..." if len(shown) < len(groups) else ""
    return f"{text}:  " + " ".join("[" + " ".join(map(str, group[:MAX_RANKS])) + "]" for group in shown) + dots


def _schedule(config: Config, layout: ParallelLayout) -> Iterator[str]:
    run, r, train = config.run, config.rollout, config.train
    engines, replicas = layout.engines * config.resilience.cells, layout.dp * config.resilience.cells
    yield "Batch schedule"
    if run.mode == "rl":
        samples = r.rollout_batch_size * r.n_samples_per_prompt
        size = train.global_batch_size or samples
        steps = run.num_rollout * (samples // size)
        yield f"  rollout       {r.rollout_batch_size} prompts x {r.n_samples_per_prompt} samples = {samples:,} samples"
        yield f"                {samples / engines:,.4g} for each of {_plural(engines, 'engine')}"
        yield f"  train         {_plural(samples // size, 'optimizer step')} of {size:,} samples in each rollout"
        ending = f"{run.num_rollout:,} rollouts, {steps:,} optimizer steps, {run.num_rollout * samples:,} samples"
    else:
        size = train.global_batch_size or r.rollout_batch_size
        what = "pairs" if config.trains_on_pairs else "sequences"
        yield f"  train         {size:,} {what} in each optimizer step"
        ending = f"{run.num_rollout:,} optimizer steps, {run.num_rollout * size:,} {what}"
    yield f"                {size / replicas:,.4g} for each of {_plural(replicas, 'replica')} of the trainer"
    yield f"                {_micro_batches(config, layout, size)}"
    evaluations: dict[tuple[int | None, int | None], list[str]] = {}
    for one in config.eval_sets:
        evaluations.setdefault((one.eval_interval, one.n_samples_per_eval_prompt), []).append(one.name)
    for (interval, count), names in evaluations.items():
        if interval:
            each = "" if config.trains_on_pairs else f", {_plural(count or 1, 'sample')} a prompt"
            yield f"  evaluation    every {interval} and at both ends{each}"
            yield f"                {', '.join(names)}"
    if config.checkpoint.save_interval:
        yield f"  checkpoint    every {config.checkpoint.save_interval}, {sized(checkpoint_bytes(config))} each"
    yield f"  in total      {ending}"


def _micro_batches(config: Config, layout: ParallelLayout, size: int) -> str:
    budget = config.train.max_tokens_per_gpu * layout.cp
    text = f"micro-batches of at most {budget:,} tokens"
    if config.run.mode != "rl" or config.data.rollout_max_prompt_len is None:
        return text
    longest = config.data.rollout_max_prompt_len + config.rollout.rollout_max_response_len
    count = -(-size // (layout.dp * config.resilience.cells)) / max(1, budget // longest)
    return f"{text}: {ceil(count):,} if every sequence has the {longest:,} tokens that it may have"


def _memory(config: Config, layout: ParallelLayout, m: MemoryEstimate, device_gib: float | None) -> Iterator[str]:
    yield "Memory of the fullest rank, estimated (GiB)"
    where = (
        "shared by the data-parallel ranks" if layout.distributed_optimizer else "a copy on every data-parallel rank"
    )
    rows = {
        "parameters": m.parameters,
        "gradients": m.gradients,
        "optimizer": m.optimizer,
        "critic, all of that": m.critic,
        "copies of weights in FP8": m.copies,
        "activations of one micro-batch": m.activations,
        "logits": m.logits,
        "sums of leaves": m.sums,
        "engine weights": m.engine_weights,
        "KV cache, per 1,000 tokens": 1000 * m.kv_bytes_per_token,
        "in host memory": m.host,
        "while training": m.training,
        "while generating, without KV cache": m.generating,
    }
    for name, size in rows.items():
        yield from _sizes({name: size})
        if name == "optimizer":
            yield f"    ({where})"
    if device_gib is not None:
        yield from _fit(config, layout, m, device_gib)


def _fit(config: Config, layout: ParallelLayout, m: MemoryEstimate, device_gib: float) -> Iterator[str]:
    s, device, where = settings(config), int(device_gib * GIB), f"the {device_gib:g} GiB of a device"
    room = s["max_total_tokens"] or m.kv_tokens(device - CONTEXT, s["mem_fraction_static"] or STATIC_FRACTION)
    needed = needed_tokens(config, len(layout.engine_ranks))
    tokens = min(room, needed or room)
    size = tokens * m.kv_bytes_per_token
    if tokens:
        longest = (config.data.rollout_max_prompt_len or 0) + config.rollout.rollout_max_response_len
        enough = tokens == needed
        of = "all that its requests can fill" if enough else f"{tokens / longest:,.4g} of the longest sequences"
        yield f"  KV cache: {tokens:,} tokens, {of}; {size / GIB:.4g} GiB"
    else:
        yield f"  does not fit: no room for a KV cache in {where}. {remedies(config, 'generating')}"
    release = planned_release(config, m, size, device)
    if m.colocated:
        yield f"  while the trainer works the engine releases: {RELEASED[release]}"
    training, generating = peaks(m, size, release)
    yield (
        f"  at most, with {CONTEXT / GIB:g} for CUDA and NCCL: {training / GIB:.4g} while training, "
        f"{generating / GIB:.4g} while generating"
    )
    if training > device:
        yield f"  does not fit: training needs more than {where}. {remedies(config, 'training')}"


def _judge(config: Config, layout: ParallelLayout, device_gib: float | None) -> Iterator[str]:
    group, m = config.engine_group(JUDGE), estimate_judge(config)
    family = load_family(group.hf_checkpoint)
    engines = _plural(len(layout.judge_groups()), "engine")
    yield "Judge"
    yield f"  {_count(family.num_parameters())} parameters, {config.model.dtype}, from {group.hf_checkpoint}"
    yield f"  {engines} of {_plural(layout.judge_tp, 'rank')}; of each rank, estimated (GiB):"
    yield from _sizes({"engine weights": m.engine_weights, "KV cache, per 1,000 tokens": 1000 * m.kv_bytes_per_token})
    if device_gib is None:
        return
    fraction = float(group.server_args.get("mem_fraction_static") or STATIC_FRACTION)
    room = m.kv_tokens(int(device_gib * GIB) - CONTEXT, fraction)
    most = (group.server_args.get("max_running_requests") or MOST_REQUESTS) * family.max_sequence_length
    tokens = group.server_args.get("max_total_tokens") or min(room, most)
    if tokens:
        yield f"  KV cache: {tokens:,} tokens; {tokens * m.kv_bytes_per_token / GIB:.4g} GiB"
    else:
        where = f"the {device_gib:g} GiB of a device"
        yield f"  does not fit: no room for a KV cache in {where}. {remedies(config, 'generating', JUDGE)}"


def _sizes(rows: Mapping[str, int]) -> Iterator[str]:
    for name, size in rows.items():
        if size:
            small = size < GIB / 1000  # of a tiny model
            yield f"  {name:<34}" + (f"{size / 2**20:>6,.3f} MiB" if small else f"{size / GIB:>10,.3f}")


def _count(parameters: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if parameters >= 0.9995 * unit:  # from here on three digits are at least 1 of the unit, not 1e+03 of the next
            return f"{parameters / unit:.3g} {name}"
    return str(parameters)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
