"""From ``reward.rm_type`` to a function that scores samples, with everything that it returns checked."""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from miles_spmd.config import RewardConfig
from miles_spmd.plugins.plug_point import PlugPointError, import_function
from miles_spmd.plugins.reward import Score
from miles_spmd.rewards.adapters import BadReward, adapt
from miles_spmd.rewards.code import code
from miles_spmd.rewards.exact import exact
from miles_spmd.rewards.f1 import f1
from miles_spmd.rewards.gpqa import gpqa
from miles_spmd.rewards.judge import judge
from miles_spmd.rewards.remote import ServiceReward, remote
from miles_spmd.sandbox.sandbox import problem
from miles_spmd.types.printable import MAX_LINE
from miles_spmd.types.sample import Sample

BUILT_IN = ("math", "exact", "f1", "gpqa", "code", "remote", "judge")
SERVICES: Mapping[str, Callable[[RewardConfig], ServiceReward]] = {"remote": remote, "judge": judge}
_DEFAULTS = RewardConfig()
OUT_OF_MEMORY = "ran out of the memory that reward.reward_memory_gib allows"


@dataclass(frozen=True)
class RewardFunction:
    """A reward function in our own signature: it takes one sample, or with ``takes_group`` all samples of a prompt."""

    call: Callable[[Any], Any]
    takes_group: bool = False
    is_async: bool = False

    @property
    def scores_groups(self) -> bool:
        """Whether ``score`` is best given whole groups. An async function is, so that its samples wait concurrently."""
        return self.is_async or self.takes_group

    def score(self, samples: list[Sample], timeout: float = math.inf) -> list[Score]:
        """Return the score of each of the samples (one, or a prompt's). Raises BadReward.

        ``timeout`` in seconds limits an async function; others are limited by the pool, which kills their process.
        """
        calls = [(samples, None)] if self.takes_group else [(sample, sample.index) for sample in samples]
        values = asyncio.run(self._gather(calls, timeout)) if self.is_async else [self._call(*call) for call in calls]
        return _to_scores(values[0] if self.takes_group else values, samples)

    def _call(self, argument: Any, index: int | None) -> Any:
        with _reported(index):
            return self.call(argument)

    async def _gather(self, calls: Sequence[tuple[Any, int | None]], timeout: float) -> list[Any]:
        async def call(argument: Any, index: int | None) -> Any:
            with _reported(index):  # in the task that runs it: an exit that leaves a task ends the event loop
                return await self.call(argument)

        async def in_time(argument: Any, index: int | None) -> Any:
            try:
                return await asyncio.wait_for(call(argument, index), timeout)
            except TimeoutError as error:
                raise BadReward(f"took longer than reward.reward_timeout = {timeout:g} s", index) from error

        return await asyncio.gather(*(in_time(*one) for one in calls))


def load_reward(rm_type: str, batched: bool, config: RewardConfig = _DEFAULTS) -> RewardFunction:
    """Return the function that ``reward.rm_type`` names; ``batched`` is ``reward.reward_batched``. ``config`` has the
    settings of built-in functions.

    Raises PlugPointError if it cannot be imported, has a signature that is not supported, or needs the sandbox where
    there is none.
    """
    if (grade := _built_in(rm_type)) is not None:
        return RewardFunction(lambda sample: grade(sample.text, sample.prompt.label))
    if rm_type in SERVICES:
        return RewardFunction(SERVICES[rm_type](config), is_async=True)
    function = import_function("reward.rm_type", rm_type, BUILT_IN)
    try:
        adapted = adapt(function, batched)
    except BadReward as error:
        raise PlugPointError(f"reward.rm_type = {rm_type!r} {error.problem}") from None
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    return RewardFunction(*adapted, is_async)


def _built_in(rm_type: str) -> Callable[[str, Any], Any] | None:
    """Return the built-in function of a response's text and its label, None for another name."""
    match rm_type:
        case "exact":
            return exact
        case "f1":
            return f1
        case "gpqa":
            return gpqa
        case "math":
            from miles_spmd.rewards.math import math  # imports sympy, which takes a second

            return math
        case "code":
            if (lack := problem()) is not None:
                raise PlugPointError(f"reward.rm_type = 'code' requires the sandbox: {lack}")
            return code
    return None


def to_score(value: Any, sample: Sample) -> Score:
    """Return what a function returned for ``sample`` as a Score. Raises BadReward unless it is a finite number, or a
    dict with one under ``score``, or with one for each turn under ``turn_rewards``."""
    named = value if isinstance(value, dict) else {"score": value}
    turn_rewards = _turn_rewards(named["turn_rewards"], sample) if "turn_rewards" in named else []
    if turn_rewards:
        named = {"score": math.fsum(turn_rewards)} | named
    if "score" not in named:
        keys = ", ".join(_shown(key, str) for key in named)
        raise BadReward(f"returned an object without 'score' (it has {keys})", sample.index)
    score = _number(named["score"])
    if not math.isfinite(score):
        raise BadReward(f"returned {_shown(value)} instead of a finite number", sample.index)
    detail = {_shown(k, str): _number(v) for k, v in named.items() if k != "score" and isinstance(v, numbers.Real)}
    for name, number in detail.items():
        if not (math.isfinite(number) and name.isprintable()):
            raise BadReward(
                f"returned {name!r}: {number}; a detail is a finite number with a printable name", sample.index
            )
    return Score(score, detail, turn_rewards)


def _turn_rewards(value: Any, sample: Sample) -> list[float]:
    """Raises BadReward unless there is a finite number for each turn of ``sample``."""
    try:
        rewards = [_number(reward) for reward in value]
    except Exception:
        rewards = []
    if len(rewards) != sample.turns or not all(map(math.isfinite, rewards)):
        raise BadReward(
            f"returned turn_rewards {_shown(value)} instead of a finite number for each of the {sample.turns} turns",
            sample.index,
        )
    return rewards


def _number(value: Any) -> float:
    """Return the value as a float, NaN where it is none: objects of a reward function may raise anything."""
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)
    except Exception:
        return math.nan


def _shown(value: Any, form: Callable[[Any], str] = repr, longest: int = 200) -> str:
    """Return the value as a message shows it, whatever its own ``__repr__`` does."""
    try:
        return form(value)[:longest]
    except Exception:
        return f"an object of the class {type(value).__name__}"


def _to_scores(values: Any, samples: list[Sample]) -> list[Score]:
    try:
        values = list(values)
    except TypeError:
        raise BadReward(f"returned {_shown(values)} instead of a list of {len(samples)} rewards") from None
    if len(values) != len(samples):
        raise BadReward(f"returned {len(values)} rewards for {len(samples)} samples")
    return [to_score(v, s) for v, s in zip(values, samples)]


@contextmanager
def _reported(index: int | None) -> Iterator[None]:
    """Raise whatever a reward function raises as a BadReward with the ``index`` of its sample."""
    try:
        yield
    except BadReward as error:  # of an adapter, which does not know the index
        raise BadReward(error.problem, index) from error
    except MemoryError as error:
        raise BadReward(OUT_OF_MEMORY, index) from error
    except SystemExit as error:
        raise BadReward(f"called sys.exit({_shown(error.code)})", index, traceback.format_exc()) from error
    except Exception as error:
        raise BadReward(
            f"raised {type(error).__name__}: {_shown(error, str, MAX_LINE)}", index, traceback.format_exc()
        ) from error
