"""What runs inside a process of the reward pool. Imports no torch unless the user's reward function does."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

import msgspec

from miles_spmd.config import RewardConfig
from miles_spmd.plugins.reward import Score
from miles_spmd.rewards.functions import BadReward, BoundReward, bind
from miles_spmd.types.sample import Sample

_PR_SET_PDEATHSIG = 1


class Failed(msgspec.Struct, frozen=True):
    """Why a call gave no scores; plain data, because not every exception survives pickling."""

    problem: str
    index: int | None = None
    trace: str = ""


class _State:
    reward: BoundReward | None = None
    failed: Failed | None = None
    timeout = 0.0


def initialize(config: RewardConfig, parent: int) -> None:
    """Import the reward function and set this process's limits. Never raises: the pool would start it for ever."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed controller leaves no process behind
    if os.getppid() != parent:
        os._exit(1)
    sys.path.insert(0, os.getcwd())  # as `python -m` does; a console script does not
    _State.timeout = config.reward_timeout
    try:
        _State.reward = bind(config.rm_type, config.reward_batched)
    except BadReward as error:
        _State.failed = Failed(error.problem, error.index, error.trace)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = used + int(config.reward_memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def wants_groups() -> bool | Failed:
    """Whether the function is called with whole groups; the first question to a new pool."""
    if _State.reward is None:
        return _State.failed or Failed("was not imported")
    return _State.reward.wants_groups


def score(samples: list[Sample]) -> list[Score] | Failed:
    """One call of the reward function, in the process's main thread."""
    if _State.reward is None:
        return _State.failed or Failed("was not imported")
    try:
        return _State.reward.score(samples, _State.timeout)
    except BadReward as error:
        return Failed(error.problem, error.index, error.trace)
    except MemoryError:
        return Failed("ran out of the memory that reward.reward_memory_gib allows")
