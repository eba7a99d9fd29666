"""How long a refit takes, part by part, and how long the engine stands still for it: from its last token before to its
first after, less what the trainer does meanwhile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch.distributed as dist

from miles_spmd.bench.machine import slowest, timed
from miles_spmd.bench.result import Row
from miles_spmd.bench.workload import generate, random_requests
from miles_spmd.config.schema import Config
from miles_spmd.models import load_family
from miles_spmd.refit import Refit
from miles_spmd.rollout.engine import Engine
from miles_spmd.training.network import Network

WARM_UP = 3


def measure(config: Config, make_engine: Callable[[Config], Engine], repeats: int) -> list[Row]:
    """Collective. Milliseconds are medians of the slowest rank, bytes are those of all ranks.

    The trainer is its network alone: gradients and moments have no part in a refit.
    """
    family = load_family(config.model.hf_checkpoint)
    network = Network(config, family, config.model.hf_checkpoint)
    engine = make_engine(config)  # takes what the network leaves
    seconds, refit = timed(
        lambda: Refit(
            network.weights(),
            network.layout(),
            engine.weights(),
            engine.layout(),
            bucket_bytes=config.refit.refit_bucket_mib << 20,
        )
    )
    plan = slowest([seconds])
    request = random_requests(1, 16, 1, family.vocab_size)
    rows = []
    for refit.checksums in (True, False):
        taken: dict[str, list[float]] = defaultdict(list)
        for repeat in range(WARM_UP + repeats):
            for part, action in {
                "release": engine.release,
                "resume weights": engine.resume_weights,
                "copy": refit.run,
                "resume rest": engine.resume,
                "commit": lambda: engine.commit(0),
                "first token": lambda: generate(engine, request),
            }.items():
                seconds, _ = timed(action)
                if repeat >= WARM_UP:
                    taken[part].append(seconds)
        times = {part: 1e3 * slowest(all_seconds) for part, all_seconds in taken.items()}
        rows.append(
            {
                "checksums": refit.checksums,
                "plan s": plan,
                "GB": sum(everywhere(float(refit.counts.bytes_local))) / 1e9,
                "GB from other ranks": sum(everywhere(float(refit.counts.bytes_received))) / 1e9,
                **{f"{part} ms": value for part, value in times.items()},
                "loop ms": sum(times[part] for part in ("resume weights", "copy", "resume rest", "commit")),
                "stopped ms": sum(times.values()),
            }
        )
    return rows


def everywhere(number: float) -> list[float]:
    numbers = [0.0] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return numbers
