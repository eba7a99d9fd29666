"""From a user's reward function, in the signature that it has, to a function of a sample or of a prompt's samples.

TRL's and veRL's functions run unchanged: ``adapt`` recognises them by the names of their parameters, and ``_trl`` and
``_verl`` define what each parameter gets. An adapter returns what the function returns, a coroutine if it is async.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from miles_spmd.plugins.reward import START, TrainerState
from miles_spmd.types.sample import Prompt, Sample
from miles_spmd.types.trajectory import Trajectory

Function = Callable[..., Any]
_TRL = {"prompts", "completions", "completion_ids"}  # any of these names tells a function of TRL
_ENVIRONMENTS = (
    "requires environments, which TRL's environment_factory makes; here they are in other processes than rewards: "
    "environment.environment = 'miles_spmd.environments.trl:trl' plays them, and their get_reward gives the reward"
)
_VERL, _VERL_GROUP = {"solution_str", "ground_truth"}, {"solution_strs", "ground_truths"}

trainer_state: ContextVar[TrainerState] = ContextVar("trainer_state", default=START)
"""Where the run was when the samples were generated that a function is given."""


class BadReward(Exception):
    """A reward function that raised, or returned no reward. ``index`` is that of the sample, where one is known.

    All arguments reach ``Exception``, so that it survives the way from a process of the pool to the controller.
    """

    def __init__(self, problem: str, index: int | None = None, trace: str = "") -> None:
        super().__init__(problem, index, trace)
        self.problem = problem
        self.index = index
        self.trace = trace


def adapt(function: Function, batched: bool) -> tuple[Function, bool]:
    """Wrap ``function`` by its signature; ``batched`` is ``reward.reward_batched``. Returns the wrapper, and whether it
    takes the list of a prompt's samples instead of one sample. Raises BadReward for any other signature."""
    named, _ = _parameters(function)
    if named.keys() & _TRL:
        return lambda samples: _call_trl(function, samples), True
    if named.keys() >= _VERL:
        return lambda sample: function(**_accepted(function, _verl(sample))), False
    if named.keys() >= _VERL_GROUP:
        return lambda samples: function(**_accepted(function, _verl_group(samples))), True
    parameters = list(inspect.signature(function).parameters)
    if not named or list(named.values()).count(False) > 1:
        raise BadReward(
            f"has the parameters ({', '.join(parameters)}); write f(sample), f(samples) with reward.reward_batched, "
            f"f(prompts, completions, **columns), or f(data_source, solution_str, ground_truth, extra_info)"
        )
    return lambda samples: function(**{parameters[0]: samples}), batched


def missing_columns(function: Function, prompt: Prompt) -> str | None:
    """Return what ``function`` requires and a dataset with rows such as ``prompt`` does not have, None if nothing."""
    named, _ = _parameters(function)
    sample = Sample(prompt, 0, Trajectory(prompt.tokens))
    try:
        if named.keys() & _TRL:
            _accepted(function, _trl([sample]))
        elif named.keys() >= _VERL:
            _accepted(function, _verl(sample))
        elif named.keys() >= _VERL_GROUP:
            _accepted(function, _verl_group([sample]))
    except BadReward as error:
        return error.problem
    return None


def _call_trl(function: Function, samples: list[Sample]) -> Any:
    """Call a function of TRL. What it logs as metrics becomes the samples' detail; extra columns are left out."""
    logged: defaultdict[str, list[float]] = defaultdict(list)
    columns = _trl(samples) | {"log_metric": lambda name, value: logged[name].append(float(value))}
    returned = function(**_accepted(function, columns))

    async def awaited() -> Any:
        return _with_detail(await returned, logged)

    return awaited() if inspect.isawaitable(returned) else _with_detail(returned, logged)


def _with_detail(rewards: Any, logged: Mapping[str, list[float]]) -> Any:
    if not logged:
        return rewards
    detail = {name: sum(values) / len(values) for name, values in logged.items()}
    return [None if reward is None else {**detail, "score": reward} for reward in rewards]


def _ignore(name: str, values: Any) -> None:
    """Stands for TRL's logging functions."""


def _trl(samples: list[Sample]) -> dict[str, Any]:
    metadata = [s.prompt.metadata for s in samples]
    columns: dict[str, Any] = {key: [m.get(key) for m in metadata] for m in metadata for key in m}
    columns |= {"log_metric": _ignore, "log_extra": _ignore, "trainer_state": trainer_state.get()}
    columns["label"] = [s.prompt.label for s in samples]
    columns["completion_ids"] = [s.response for s in samples]
    if conversations := columns.pop("messages", None):
        columns["prompts"] = conversations
        columns["completions"] = [_completion(s) for s in samples]
    else:
        columns["prompts"] = [s.prompt.text for s in samples]
        columns["completions"] = [s.text for s in samples]
    return columns


def _completion(sample: Sample) -> list[dict[str, Any]]:
    """Return the messages behind those of the prompt: several, where the environment keeps a conversation."""
    behind = sample.trajectory.messages[len(sample.prompt.metadata["messages"]) :]
    return behind or [{"role": "assistant", "content": sample.text}]


def _verl(sample: Sample) -> dict[str, Any]:
    metadata = sample.prompt.metadata
    extra = metadata.get("extra_info", metadata)
    return {
        "data_source": metadata.get("data_source", sample.prompt.uid.rpartition(":")[0]),
        "solution_str": sample.text,
        "ground_truth": sample.prompt.label,
        "extra_info": {**extra, "num_turns": len(sample.trajectory.segments) + 1} if isinstance(extra, dict) else extra,
    }


def _verl_group(samples: list[Sample]) -> dict[str, Any]:
    of_samples = [_verl(sample) for sample in samples]
    return {f"{name}s": [one[name] for one in of_samples] for name in of_samples[0]}


def _accepted(function: Function, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return those of the ``arguments`` that ``function`` has parameters for. Raises BadReward if some are missing."""
    named, takes_any = _parameters(function)
    if missing := {name for name, has_default in named.items() if not has_default} - arguments.keys():
        if "environments" in missing:
            raise BadReward(_ENVIRONMENTS)
        raise BadReward(
            f"requires {', '.join(sorted(missing))}, but the data has only {', '.join(sorted(arguments))} "
            f"(add the column to the data, or give the parameter a default)"
        )
    return arguments if takes_any else {name: value for name, value in arguments.items() if name in named}


def _parameters(function: Function) -> tuple[dict[str, bool], bool]:
    """Return the parameters that can be given by name, with whether they have a default; and whether any name can."""
    parameters = inspect.signature(function).parameters.values()
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: p.default is not p.empty for p in by_name}, any(p.kind is p.VAR_KEYWORD for p in parameters)
