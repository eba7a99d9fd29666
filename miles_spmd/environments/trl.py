"""Environments that were written for TRL's ``environment_factory``: a class with ``reset``, tools as its other methods,
and often ``get_reward``.

environment = "miles_spmd.environments.trl:trl"
environment_kwargs = { factory = "my_games:Wordle", max_turns = 8 }
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from miles_spmd.environments.calls import Call
from miles_spmd.environments.chat import AUTO, Chat
from miles_spmd.environments.execution import ErrorKind, Result, Toolbox
from miles_spmd.environments.tools import converse
from miles_spmd.plugins.environment import Context
from miles_spmd.plugins.plug_point import import_function
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import Trajectory

COLUMN = "environment"  # of a row, where there are several factories: the name of its own
_OTHERS = ("reset", "get_reward")  # methods that are not tools
_OURS = ("messages", "chat_template_kwargs")  # of a prompt's metadata: not columns of its row
_threads = ThreadPoolExecutor(64, "trl")  # in which methods wait that are not async


async def trl(
    context: Context,
    prompt: Prompt,
    *,
    factory: str | Mapping[str, str],
    max_turns: int = 8,
    call_format: str = AUTO,
    reasoning_format: str = AUTO,
    tool_timeout: float = 30.0,
    max_result_chars: int = 16_384,
) -> Trajectory:
    """Let the policy call the methods of an environment until it responds without a call.

    ``factory``: ``module:function`` that makes an environment, or several by name, of which the row's column
    `environment` names one. ``reset`` is given the columns of the row; what it returns follows the last message of the
    prompt. Where there is ``get_reward``, it gives the reward. The other arguments are those of `tools`.
    """
    kind = _chosen(factory, prompt), tool_timeout, max_result_chars
    player = _idle[kind].pop() if _idle[kind] else Player(*kind)
    messages = await player.begin(prompt)
    changed = msgspec.structs.replace(prompt, text="", metadata=prompt.metadata | {"messages": messages})
    formats = {"call_format": call_format, "reasoning_format": reasoning_format}
    chat = Chat(context, changed, tools=player.toolbox.schemas, **formats)
    trajectory = await converse(context, chat, player.run, max_turns)
    trajectory.reward = await player.reward()
    if player.usable:  # what has failed, in this line or before, is not used again
        _idle[kind].append(player)
    return trajectory


def _check(
    *,
    factory: str | Mapping[str, str],
    max_turns: int = 8,
    call_format: str = AUTO,
    reasoning_format: str = AUTO,
    tool_timeout: float = 30.0,
    max_result_chars: int = 16_384,
) -> None:
    """Make one environment of each factory. Raises ValueError for one that cannot be used."""
    for path in [factory] if isinstance(factory, str) else factory.values():
        kind = path, tool_timeout, max_result_chars
        _idle[kind].append(Player(*kind))


trl.check = _check  # type: ignore[attr-defined]


class Player:
    """An environment of a user, which one episode after another has for itself."""

    def __init__(self, path: str, timeout: float, longest: int) -> None:
        """Raises ValueError where ``path`` makes nothing that can be used."""
        try:
            self._environment = import_function("factory", path, ())()
        except Exception as error:
            raise ValueError(f"factory = {path!r} cannot be called: {type(error).__name__}: {error}") from error
        names = [name for name, _ in inspect.getmembers(type(self._environment), inspect.isfunction)]
        if "reset" not in names:
            raise ValueError(f"factory = {path!r} makes an object without `reset`, which begins an episode")
        self._gives_reward = "get_reward" in names
        tools = [getattr(self._environment, name) for name in names if name not in _OTHERS and name[0] != "_"]
        self.toolbox = Toolbox([_awaited(tool) for tool in tools], timeout=timeout, longest=longest, workers=1)
        self.usable = True

    async def begin(self, prompt: Prompt) -> list[dict[str, Any]]:
        """Begin an episode, and return the messages of its prompt."""
        messages = [*(prompt.metadata.get("messages") or ())]
        columns = {name: value for name, value in prompt.metadata.items() if name not in _OURS}
        observation = await _awaited(self._environment.reset)(**columns | {"prompt": messages})
        if observation is None or not messages:  # a prompt that is plain text is refused with the conversation
            return messages
        if not isinstance(observation, str) or not isinstance(messages[-1].get("content"), str):
            raise ValueError(
                f"reset returned {type(observation).__name__}; only text can follow the prompt's last text"
            )
        return [*messages[:-1], messages[-1] | {"content": messages[-1]["content"] + observation}]

    async def run(self, calls: Sequence[Call]) -> list[Result]:
        """Execute the calls one after another: they may change the environment."""
        results = [result for call in calls for result in await self.toolbox.run([call])]
        if any(result.error is ErrorKind.TIMEOUT for result in results):
            self.usable = False  # a thread may still be at work on it
        return results

    async def reward(self) -> float | None:
        return await _awaited(self._environment.get_reward)() if self._gives_reward else None


_idle: defaultdict[tuple[str, float, int], list[Player]] = defaultdict(list)  # by what they were made of


def _chosen(factory: str | Mapping[str, str], prompt: Prompt) -> str:
    if isinstance(factory, str):
        return factory
    name = str(prompt.metadata.get(COLUMN))
    if name not in factory:
        raise ValueError(f"the row's column {COLUMN!r} is {name!r}; the factories are {', '.join(factory)}")
    return factory[name]


def _awaited(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``method`` as an ``async def``: a plain one waits in a thread, not in the event loop of all episodes."""
    if inspect.iscoroutinefunction(method):
        return method

    @functools.wraps(method)
    async def call(**arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(_threads, functools.partial(method, **arguments))

    return call
