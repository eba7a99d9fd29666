"""From ``reward.rm_type`` to a function of samples: built-in rewards, and other people's in the shapes they have."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import traceback
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import msgspec

from miles_spmd.plugins.reward import Score
from miles_spmd.types.sample import Sample


class Shape(StrEnum):
    """How a function wants to be called; see ``protocols``."""

    SAMPLE = "sample"
    GROUP = "group"
    TRL = "trl"
    VERL = "verl"


class BadReward(Exception):
    """A reward function that broke its contract, with the index of the sample if it is known."""

    def __init__(self, problem: str, sample: Sample | None = None, trace: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.index = None if sample is None else sample.index
        self.trace = trace


class BoundReward(msgspec.Struct):
    """A reward function with what its signature says about it."""

    function: Callable[..., Any]
    shape: Shape
    parameters: frozenset[str]  # names it can be given
    required: frozenset[str]
    takes_any: bool  # has **kwargs
    is_async: bool

    @property
    def wants_groups(self) -> bool:
        """Called with a whole group, either as its shape says or so that its samples can wait at the same time."""
        return self.is_async or self.shape in (Shape.GROUP, Shape.TRL)

    def score(self, samples: list[Sample], timeout: float) -> list[Score]:
        """The scores of one call's samples (one, or a group). Raises BadReward."""
        if self.is_async:
            return asyncio.run(self._score_async(samples, timeout))
        if self.shape in (Shape.GROUP, Shape.TRL):
            values = _guard(None, lambda: self.function(**self._group_arguments(samples)))
            return _checked(values, samples)
        return [
            to_score(_guard(s, lambda s=s: self.function(**self._sample_arguments(s))), s)  # type: ignore[misc]
            for s in samples
        ]

    async def _score_async(self, samples: list[Sample], timeout: float) -> list[Score]:
        async def one(sample: Sample | None, arguments: dict[str, Any]) -> Any:
            try:
                return await asyncio.wait_for(self.function(**arguments), timeout)
            except TimeoutError as error:
                raise BadReward(f"took longer than reward.reward_timeout = {timeout:g} s", sample) from error
            except Exception as error:
                raise _raised(error, sample) from error

        if self.shape in (Shape.GROUP, Shape.TRL):
            return _checked(await one(None, self._group_arguments(samples)), samples)
        values = await asyncio.gather(*(one(s, self._sample_arguments(s)) for s in samples))
        return [to_score(v, s) for v, s in zip(values, samples)]

    def _sample_arguments(self, sample: Sample) -> dict[str, Any]:
        if self.shape is Shape.SAMPLE:
            return {self._first: sample}
        metadata = sample.prompt.metadata
        arguments = {
            "data_source": metadata.get("data_source", sample.prompt.uid.rpartition(":")[0]),
            "solution_str": sample.text,
            "ground_truth": sample.prompt.label,
            "extra_info": metadata.get("extra_info", metadata),
        }
        return self._accepted(arguments, sample)

    def _group_arguments(self, samples: list[Sample]) -> dict[str, Any]:
        if self.shape is Shape.GROUP:
            return {self._first: samples}
        metadata = [s.prompt.metadata for s in samples]
        columns: dict[str, list[Any]] = {key: [m.get(key) for m in metadata] for m in metadata for key in m}
        columns["label"] = [s.prompt.label for s in samples]
        columns["completion_ids"] = [s.response for s in samples]
        if conversations := columns.pop("messages", None):
            columns["prompts"] = conversations
            columns["completions"] = [[{"role": "assistant", "content": s.text}] for s in samples]
        else:
            columns["prompts"] = [s.prompt.text for s in samples]
            columns["completions"] = [s.text for s in samples]
        return self._accepted(columns, None)

    @property
    def _first(self) -> str:
        return next(iter(inspect.signature(self.function).parameters))

    def _accepted(self, arguments: dict[str, Any], sample: Sample | None) -> dict[str, Any]:
        missing = self.required - arguments.keys()
        if missing:
            raise BadReward(
                f"needs {', '.join(sorted(missing))}, but the data has only {', '.join(sorted(arguments))} "
                f"(add the column to the data, or give the parameter a default)",
                sample,
            )
        return arguments if self.takes_any else {k: v for k, v in arguments.items() if k in self.parameters}


def bind(rm_type: str, batched: bool) -> BoundReward:
    """The function that ``rm_type`` names. Raises BadReward if it cannot be imported or called."""
    if rm_type == "math":
        from miles_spmd.rewards.math import math as grade

        return _bound(lambda sample: grade(sample.text, sample.prompt.label), batched=False)
    module_name, _, name = rm_type.partition(":")
    if not module_name or not name:
        raise BadReward("is neither 'math', 'exact' nor 'module:function'")
    try:
        function: Any = importlib.import_module(module_name)
        for part in name.split("."):
            function = getattr(function, part)
    except Exception as error:
        raise BadReward(f"cannot be imported: {type(error).__name__}: {error}", trace=traceback.format_exc()) from error
    if not callable(function):
        raise BadReward(f"is {type(function).__name__}, not a function")
    return _bound(function, batched)


def _bound(function: Callable[..., Any], batched: bool) -> BoundReward:
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = frozenset(p.name for p in named)
    if "completions" in names:
        shape = Shape.TRL
    elif {"solution_str", "ground_truth"} <= names:
        shape = Shape.VERL
    else:
        shape = Shape.GROUP if batched else Shape.SAMPLE
    required = frozenset(p.name for p in named if p.default is p.empty)
    if shape in (Shape.SAMPLE, Shape.GROUP) and (not named or len(required) > 1):
        raise BadReward(
            f"has the parameters ({', '.join(p.name for p in parameters)}); write f(sample), f(samples) with "
            f"reward.reward_batched, f(prompts, completions, **columns), or "
            f"f(data_source, solution_str, ground_truth, extra_info)"
        )
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return BoundReward(function, shape, names, required, takes_any, is_async)


def to_score(value: Any, sample: Sample) -> Score:
    """What a function returned for ``sample`` as a score. Raises BadReward unless it is a finite number."""
    detail: dict[str, float] = {}
    number = value
    if isinstance(value, dict):
        if "score" not in value:
            raise BadReward(f"returned an object without 'score' (it has {', '.join(map(str, value))})", sample)
        number = value["score"]
        detail = {str(k): float(v) for k, v in value.items() if k != "score" and isinstance(v, int | float)}
    try:
        score = float(number) if not isinstance(number, str | bytes) else math.nan
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise BadReward(f"returned {value!r:.200} instead of a finite number", sample)
    return Score(score, detail)


def _checked(values: Any, samples: list[Sample]) -> list[Score]:
    try:
        values = list(values)
    except TypeError:
        raise BadReward(f"returned {values!r:.200} instead of a list of {len(samples)} rewards") from None
    if len(values) != len(samples):
        raise BadReward(f"returned {len(values)} rewards for {len(samples)} samples")
    return [to_score(v, s) for v, s in zip(values, samples)]


def _guard(sample: Sample | None, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except BadReward:
        raise
    except Exception as error:
        raise _raised(error, sample) from error


def _raised(error: Exception, sample: Sample | None) -> BadReward:
    if isinstance(error, BadReward):
        return error
    if isinstance(error, MemoryError):
        return BadReward("ran out of the memory that reward.reward_memory_gib allows", sample)
    return BadReward(f"raised {type(error).__name__}: {error}", sample, traceback.format_exc())
