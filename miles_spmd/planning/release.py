"""What an engine gives up while the trainer works on the device that they share."""

from __future__ import annotations

from enum import StrEnum

from miles_spmd.config import Config
from miles_spmd.planning.memory_estimate import MemoryEstimate

GIB = 2**30
SPARE = 2 * GIB  # that nobody plans with: fragments, workspaces of libraries
CONTEXT = 3 * GIB  # of CUDA, NCCL and the engine's graphs, before there is anything to measure


class Release(StrEnum):
    """From the least to the most. What is given up has to be asked of the driver again, 2 ms for each GiB."""

    NOTHING = "nothing"
    KV_CACHE = "kv_cache"  # and CUDA graphs
    ALL = "all"


ORDER = list(Release)


def with_margin(working: int, allowance: float) -> int:
    """Bytes to leave to a trainer that is expected to need ``working``: running out of them ends the run, because an
    engine cannot give way in the middle of a step."""
    return int(working * (1 + allowance)) + SPARE


def choose_release(config: Config, needed: int, room: int, kv_cache: int) -> Release:
    """The least that leaves a trainer ``needed`` bytes, where ``room`` bytes are free beside the engine and
    ``kv_cache`` more without its cache; or what the user wants. Where rollouts lag behind, engines need their weights.
    """
    if config.rollout.offload_rollout != "auto":
        choice = Release(config.rollout.offload_rollout)
    elif needed <= room:
        choice = Release.NOTHING
    else:
        choice = Release.KV_CACHE if needed <= room + kv_cache else Release.ALL
    lags = config.refit.update_weights_interval > 1
    return Release.KV_CACHE if lags and choice is Release.ALL else choice


def planned_release(config: Config, plan: MemoryEstimate, kv_cache: int, device: int) -> Release:
    """What is likely to be chosen for an engine with ``kv_cache`` bytes of cache on a device of ``device`` bytes."""
    room = device - CONTEXT - plan.trainer - plan.engine_weights - kv_cache
    return choose_release(config, with_margin(plan.working, config.train.memory_allowance), room, kv_cache)


def peaks(plan: MemoryEstimate, kv_cache: int, release: Release) -> tuple[int, int]:
    """Bytes of a device in use at most: while the trainer works, while the engine does."""
    kept = {Release.NOTHING: plan.engine_weights + kv_cache, Release.KV_CACHE: plan.engine_weights, Release.ALL: 0}
    beside = kept[release] if plan.colocated else 0
    return CONTEXT + plan.trainer + plan.working + beside, CONTEXT + plan.generating + kv_cache
