"""Time for an engine to release its memory, the KV cache or all of it, and to resume it, and whether memory leaks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import psutil

from miles_spmd.bench.machine import free_gib, slowest, stage, timed
from miles_spmd.bench.refit import release_of
from miles_spmd.bench.result import Row
from miles_spmd.bench.workload import generate, random_requests
from miles_spmd.config import Config
from miles_spmd.generation.engine import Engine
from miles_spmd.models import load_family
from miles_spmd.planning.release import Release

WARM_UP = 3


def measure(config: Config, make_engine: Callable[[Config], Engine], cycles: int) -> list[Row]:
    """Measure both levels of release. Collective. Every cycle also generates a little. Growth is the slope of a line
    through all cycles. ``planned`` states whether a run with these settings would release as much."""
    stage("building the engine")
    engine = make_engine(config)
    planned = release_of(config, engine)
    return [_row(engine, config, cycles, level, level is planned) for level in (Release.KV_CACHE, Release.ALL)]


def _row(engine: Engine, config: Config, cycles: int, level: Release, planned: bool) -> Row:
    requests = random_requests(4, 16, 4, load_family(config.model.hf_checkpoint).vocab_size)
    stage(f"{cycles} cycles of releasing {level}")
    release_s, resume_s, device, host, freed = [], [], [], [], 0.0
    for cycle in range(WARM_UP + cycles):
        engine.commit(0)
        generate(engine, requests)
        before = free_gib()
        release, _ = timed(lambda: engine.release(keep_weights=level is Release.KV_CACHE))
        freed = free_gib() - before
        resume, _ = timed(engine.resume)
        if cycle >= WARM_UP:
            release_s.append(release)
            resume_s.append(resume)
            device.append(-1024 * free_gib())
            host.append(psutil.Process().memory_info().rss / 2**20)
        for weight in engine.weights().values():  # their contents are lost
            weight.zero_()
    return {
        "released": str(level),
        "planned": planned,
        "cycles": cycles,
        "GiB": freed,
        "release ms": 1e3 * slowest(release_s),
        "resume ms": 1e3 * slowest(resume_s),
        "GPU growth MiB/cycle": _slope(device),
        "host growth MiB/cycle": _slope(host),
    }


def _slope(values: list[float]) -> float:
    return float(np.polynomial.polynomial.polyfit(range(len(values)), values, 1)[1])
