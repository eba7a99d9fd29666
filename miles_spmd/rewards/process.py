"""One process of the reward pool: the reward functions in it, and the calls of them from outside."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from miles_spmd.config import RewardConfig
from miles_spmd.plugins.plug_point import PlugPointError
from miles_spmd.plugins.reward import RewardError, Score, TrainerState
from miles_spmd.processes.limited import LimitedProcess, NotLoadedError, ProcessEndedError, serve_calls
from miles_spmd.rewards.adapters import BadReward, trainer_state
from miles_spmd.rewards.functions import OUT_OF_MEMORY, load_reward
from miles_spmd.types.sample import Sample

_VERIFIERS = ("code", "math")  # built-in functions whose time depends on what the response contains
_GRACE = 2.0  # seconds that an async function's own timeout has before its process is killed


class Function(NamedTuple):
    """A reward function that the processes of a pool import."""

    rm_type: str
    batched: bool


class RewardProcess:
    """The pool's side, used by one thread at a time. A process that has ended is replaced in the next call.

    It dies with the thread that has started it. What it prints goes to ``log``.
    """

    def __init__(self, config: RewardConfig, functions: Sequence[Function], log: Path | None = None) -> None:
        self._config, self._functions = config, functions
        self._process = LimitedProcess(serve, (functions, config), config.reward_environment, log)

    def kill(self) -> None:
        """End the process for good."""
        self._process.kill()

    def scores_groups(self, function: Function) -> bool:
        """Wait until all functions are imported and return whether calls of this one are of whole groups. Raises
        RewardError if one cannot be imported or called."""
        try:
            grouped: list[bool] = self._process.loaded()
        except NotLoadedError as error:
            raise self._unusable(error) from error
        return grouped[self._functions.index(function)]

    def _unusable(self, error: NotLoadedError) -> RewardError:
        return RewardError(f"reward.rm_type = {', '.join(repr(one.rm_type) for one in self._functions)} {error}")

    def score(self, function: Function, samples: list[Sample], state: TrainerState) -> list[Score | None]:
        """Call the reward function once. ``state``: that of the run. Raises BadReward, and RewardError where it
        can no longer be imported."""
        verifies = function.rm_type in _VERIFIERS
        # an async function has a timeout of its own, which gives the better message
        timeout = self._config.reward_timeout + (_GRACE if self.scores_groups(function) else 0)
        try:
            scores: list[Score | None] = self._process.call(timeout, self._functions.index(function), samples, state)
            if verifies:  # the mean of this detail is then the share of responses whose verification was killed
                scores = [one and Score(one.value, {**one.detail, "killed": 0.0}) for one in scores]
            return scores
        except TimeoutError:
            problem = f"took longer than reward.reward_timeout = {self._config.reward_timeout:g} s"
        except ProcessEndedError as error:
            problem = f"ended its process ({error})"
        except NotLoadedError as error:
            raise self._unusable(error) from error
        except MemoryError:
            raise BadReward(OUT_OF_MEMORY) from None
        if verifies:  # what cannot be verified in time and memory is wrong
            return [Score(0.0, {"killed": 1.0}) for _ in samples]
        raise BadReward(problem, samples[0].index if len(samples) == 1 else None)


def serve(pipe: Connection, functions: Sequence[Function], config: RewardConfig) -> None:
    """Import the reward functions, and score what comes through the pipe. Runs inside the process."""
    serve_calls(pipe, partial(_load, functions, config), config.reward_memory_gib)


def _load(
    functions: Sequence[Function], config: RewardConfig
) -> tuple[Callable[[int, list[Sample], TrainerState], list[Score | None]], list[bool]]:
    try:
        rewards = [load_reward(*function, config) for function in functions]
    except PlugPointError as error:
        raise RewardError(f"{error}\n{traceback.format_exc()}" if error.__cause__ else str(error)) from None

    def score(index: int, samples: list[Sample], state: TrainerState) -> list[Score | None]:
        trainer_state.set(state)
        return rewards[index].score(samples, config.reward_timeout)

    return score, [reward.scores_groups for reward in rewards]
