"""What runs inside a process of the reward pool. Imports no torch unless the user's reward function does."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

from miles_spmd.config import RewardConfig
from miles_spmd.plugins.plug_point import PlugPointError
from miles_spmd.plugins.reward import RewardError, Score
from miles_spmd.rewards.failure import BadReward
from miles_spmd.rewards.functions import RewardFunction, load_reward
from miles_spmd.types.sample import Sample

_PR_SET_PDEATHSIG = 1


class _State:
    """This process's reward function, or why there is none."""

    reward: RewardFunction | None = None
    error = RewardError("the reward function was not imported")
    timeout = 0.0


def initialize(config: RewardConfig, parent: int) -> None:
    """Import the reward function and set this process's limits.

    An error of the import is raised by the first call: raised here, the pool would restart the process forever.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed controller leaves no process behind
    if os.getppid() != parent:
        os._exit(1)
    sys.path.insert(0, os.getcwd())  # as `python -m` does; a console script does not
    _State.timeout = config.reward_timeout
    try:
        _State.reward = load_reward(config.rm_type, config.reward_batched)
    except PlugPointError as error:
        _State.error = RewardError(f"{error}\n{traceback.format_exc()}" if error.__cause__ else str(error))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = used + int(config.reward_memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def scores_groups() -> bool:
    """Return whether calls are of whole groups; the first call of a new pool. Raises RewardError."""
    return _reward().scores_groups


def score(samples: list[Sample]) -> list[Score]:
    """Call the reward function once, in the process's main thread. Raises BadReward or RewardError."""
    try:
        return _reward().score(samples, _State.timeout)
    except MemoryError as error:
        raise BadReward("ran out of the memory that reward.reward_memory_gib allows") from error


def _reward() -> RewardFunction:
    if _State.reward is None:
        raise _State.error
    return _State.reward
