"""What an engine gives up while the trainer works on the device that they share."""

from __future__ import annotations

from enum import StrEnum

from miles_spmd.config.schema import Config
from miles_spmd.planning.memory import MemoryEstimate

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


def choose_release(working: int, room: int, kv_cache: int) -> Release:
    """The least that leaves the trainer ``working`` bytes, margin included, where ``room`` bytes are free beside the
    engine and ``kv_cache`` more without its cache."""
    if working <= room:
        return Release.NOTHING
    return Release.KV_CACHE if working <= room + kv_cache else Release.ALL


def planned_release(config: Config, plan: MemoryEstimate, kv_cache: int, device: int) -> Release:
    """What :func:`choose_release` is likely to choose for an engine with ``kv_cache`` bytes of cache on a device of
    ``device`` bytes."""
    if config.rollout.offload_rollout != "auto":
        return Release(config.rollout.offload_rollout)
    room = device - CONTEXT - plan.trainer - plan.engine_weights - kv_cache
    return choose_release(with_margin(plan.working, config.train.memory_allowance), room, kv_cache)
