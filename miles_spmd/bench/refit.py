"""Time of a refit, part by part, and for how long it stops the engine: from the last token before it to the first after
it, without the trainer's work in between. The engine releases as much memory as it would have to beside the whole
trainer; an engine with a device of its own releases nothing."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch.distributed as dist

from miles_spmd.bench.machine import everywhere, slowest, stage, timed
from miles_spmd.bench.result import Row
from miles_spmd.bench.workload import generate, random_requests
from miles_spmd.config import Config
from miles_spmd.generation.engine import Engine
from miles_spmd.models import load_family
from miles_spmd.planning.memory_estimate import estimate_memory
from miles_spmd.planning.parallel_layout import ParallelLayout
from miles_spmd.planning.release import Release, planned_release
from miles_spmd.platform import device_memory
from miles_spmd.training.network import Network
from miles_spmd.types.request import Request
from miles_spmd.weights.refit import Refit
from miles_spmd.worker.world import take_side

WARM_UP = 3
LONGEST = timedelta(minutes=10)


def measure(config: Config, make_engine: Callable[[Config], Engine], repeats: int) -> list[Row]:
    """Measure refits with and without checksums. Collective. Milliseconds are medians of the slowest rank, bytes are
    those of all ranks.

    The trainer is only its network: a refit touches neither gradients nor moments.
    """
    family = load_family(config.model.hf_checkpoint)
    side = take_side(config.rollout.rollout_num_gpus, LONGEST)
    stage("building the trainer's network")
    network = Network(config, family, config.model.hf_checkpoint) if side.trains else None
    stage("building the engine")
    engine = make_engine(config) if side.generates else None  # sizes its cache by the memory that the network leaves
    stage("planning the refit")
    seconds, refit = timed(
        lambda: Refit(
            network.weights() if network else {},
            network.layout() if network else [],
            engine.weights() if engine else {},
            engine.layout() if engine else [],
            bucket_bytes=config.refit.refit_bucket_mib << 20,
            group=side.everyone,
        ),
        side.everyone,
    )
    plan = slowest([seconds], side.everyone)
    level = release_of(config, engine) if engine and side.everyone is None else Release.NOTHING
    parts = _parts(engine, random_requests(1, 16, 1, family.vocab_size), refit, level)
    rows = []
    for refit.checksums in (True, False):
        stage(f"refits {'with' if refit.checksums else 'without'} checksums")
        taken: dict[str, list[float]] = defaultdict(list)
        for repeat in range(WARM_UP + repeats):
            for part, action in parts.items():
                seconds, _ = timed(action, side.everyone)
                if repeat >= WARM_UP:
                    taken[part].append(seconds)
        times = {part: 1e3 * slowest(all_seconds, side.everyone) for part, all_seconds in taken.items()}
        rows.append(
            {
                "checksums": refit.checksums,
                "released": str(level),
                "KV cache GiB": max(everywhere(engine.memory().kv_cache if engine else 0, side.everyone)) / 2**30,
                "plan s": plan,
                "GB": sum(everywhere(refit.counts.bytes_local, side.everyone)) / 1e9,
                "GB from other ranks": sum(everywhere(refit.counts.bytes_received, side.everyone)) / 1e9,
                **{f"{part} ms": value for part, value in times.items()},
                "loop ms": sum(times[part] for part in times if part not in ("release", "first token")),
                "stopped ms": sum(times.values()),
            }
        )
    return rows


def release_of(config: Config, engine: Engine) -> Release:
    """Return what the engine would release beside a whole trainer, of which only the network may exist here."""
    layout = ParallelLayout.of(config, dist.get_world_size())
    plan = estimate_memory(config, load_family(config.model.hf_checkpoint), layout)
    return planned_release(config, plan, engine.memory().kv_cache, device_memory.read().total)


def _parts(
    engine: Engine | None, request: list[Request], refit: Refit, level: Release
) -> Mapping[str, Callable[[], object]]:
    """Return the parts of a refit between two tokens, in order; a rank without an engine waits in those of engines."""
    if engine is None:
        return {"copy": refit.run, "commit": _wait, "first token": _wait}
    generation = {"commit": lambda: engine.commit(0), "first token": lambda: generate(engine, request)}
    if level is Release.NOTHING:
        return {"copy": refit.run, **generation}
    return {
        "release": functools.partial(engine.release, keep_weights=level is Release.KV_CACHE),
        "resume weights": engine.resume_weights,
        "copy": refit.run,
        "resume rest": engine.resume,
        **generation,
    }


def _wait() -> None:
    pass
