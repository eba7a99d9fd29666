"""Environments of the package `verifiers` (0.1, https://github.com/PrimeIntellect-ai/verifiers): their own loop of
turns and their own rubric, with this run's policy as the model that they ask.

python -m miles_spmd.environments.verifiers data.jsonl wordle --count 1000

environment = "miles_spmd.environments.verifiers:verifiers"
environment_kwargs = { env = "wordle" }
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from miles_spmd.environments.chat import AUTO, Chat, Reply
from miles_spmd.environments.tool_schemas import Schema
from miles_spmd.plugins.environment import Context
from miles_spmd.plugins.plug_point import PlugPointError, import_function
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import FinishReason, Trajectory

try:
    import verifiers as vf
    from verifiers.clients import Client
except ImportError as error:
    raise ImportError(f"the package verifiers is missing ({error}): pip install 'miles-spmd[verifiers]'") from error

COLUMN = "verifiers"  # of the data: a row of the environment's dataset, without prompt and label
LABEL = "answer"  # the name of the column that data.label_key names, in verifiers
MODEL = "policy"  # what environments are told
_LIMITS = ("max_tokens", "max_completion_tokens")
_WITHOUT_EFFECT = {"n": 1, "extra_body": {}}  # as verifiers sets them by default


async def verifiers(
    context: Context,
    prompt: Prompt,
    *,
    env: str,
    env_args: Mapping[str, Any] | None = None,
    call_format: str = AUTO,
    reasoning_format: str = AUTO,
) -> list[Trajectory]:
    """Let the environment ``env`` of verifiers play, and score what came of it by its rubric.

    ``env`` is the name that `vf.load_environment` knows, or ``module:function`` of a function that returns an
    environment; ``env_args`` are its arguments. An environment that continues its conversation gives one trajectory;
    each conversation that it begins anew is a sibling.
    """
    environment = _environment(env, msgspec.json.encode(env_args or {}))
    policy = Policy(context, prompt, call_format, reasoning_format)
    state = await environment.rollout(_row(prompt), policy, MODEL, {})
    if (error := state.get("error")) is not None:
        raise error.__cause__ if isinstance(error.__cause__, Exception) else error
    await environment.rubric.score_rollout(state)
    await environment.rubric.cleanup(state)
    return policy.finish(state)


def _check(
    *,
    env: str,
    env_args: Mapping[str, Any] | None = None,
    call_format: str = AUTO,
    reasoning_format: str = AUTO,
) -> None:
    """Raise ValueError for an environment that cannot be loaded, or whose episodes cannot be scored one by one."""
    environment = _environment(env, msgspec.json.encode(env_args or {}))
    if environment.requires_group_rollouts:
        raise ValueError(
            f"the rubric of {env!r} compares the responses to a prompt, and an episode is one of them; use "
            "reward.reward_batched for such a reward"
        )


verifiers.check = _check  # type: ignore[attr-defined]


class _Talk(NamedTuple):
    chat: Chat
    tools: list[Schema]
    messages: list[dict[str, Any]]  # as the environment has them


class Policy(Client):  # type: ignore[misc]
    """The client that an environment asks for responses; it belongs to one episode.

    The environment sends the whole conversation each time. One that it has only continued since the policy's last
    response keeps the tokens that were sampled; any other begins with the tokens of its text.
    """

    def __init__(self, context: Context, prompt: Prompt, call_format: str, reasoning_format: str) -> None:
        super().__init__(context)
        self._context, self._prompt = context, prompt
        self._formats = {"call_format": call_format, "reasoning_format": reasoning_format}
        self._talks: list[_Talk] = []
        self._turns: list[tuple[Trajectory, int]] = []  # by the ids of the responses

    async def to_native_tool(self, tool: Any) -> Schema:
        function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
        return {"type": "function", "function": function}

    async def to_native_prompt(self, messages: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        return [_message(message) for message in messages], {}

    async def get_native_response(
        self,
        prompt: list[dict[str, Any]],
        model: str,
        sampling_args: Mapping[str, Any],
        tools: list[Schema] | None = None,
        **_: Any,
    ) -> tuple[_Talk, Reply]:
        limits = _limits(sampling_args)
        talk = self._continue(prompt, tools or []) or self._begin(prompt, tools or [])
        reply = await talk.chat.respond(**limits)
        if not reply.completion.tokens:
            raise vf.OverlongPromptError("the conversation fills the context, or the limit of a trajectory")
        self._turns.append((talk.chat.trajectory, talk.chat.trajectory.turns - 1))
        talk.messages[:] = [*prompt, _message(_response_message(reply))]
        return talk, reply

    async def raise_from_native_response(self, response: tuple[_Talk, Reply]) -> None:
        pass  # an empty message is one, too

    async def from_native_response(self, response: tuple[_Talk, Reply]) -> Any:
        talk, reply = response
        tokens, sampled = len(talk.chat.trajectory.tokens), len(reply.completion.tokens)
        usage = vf.Usage(
            prompt_tokens=tokens - sampled, reasoning_tokens=0, completion_tokens=sampled, total_tokens=tokens
        )
        number = len(self._turns) - 1
        return vf.Response(id=str(number), created=0, model=MODEL, usage=usage, message=_response_message(reply))

    def setup_client(self, config: Any) -> Any:
        raise TypeError("this client has no configuration")

    async def close(self) -> None:
        pass

    def finish(self, state: Mapping[str, Any]) -> list[Trajectory]:
        """Return the trajectories, the first with the rubric's reward; steps to which the environment has given
        rewards keep them. Raises ValueError where the environment has asked for nothing."""
        if not self._turns:
            raise ValueError("the environment has asked the policy for nothing")
        talks = [talk for talk in self._talks if talk.messages]  # another one did not fit into the context
        trajectories = [talk.chat.trajectory for talk in talks]
        for talk in talks:
            talk.chat.trajectory.text = talk.messages[-1]["content"]
        if state.get("is_truncated"):
            trajectories[-1].finish_reason = FinishReason.LENGTH
        for step in state["trajectory"]:
            if step["reward"] is not None:
                trajectory, turn = self._turns[int(step["response"].id)]
                trajectory.reward_turn(step["reward"], turn)
        trajectories[0].reward = state["reward"]
        trajectories[0].reward_detail = dict(state["metrics"] or {})
        return trajectories

    def _continue(self, messages: list[dict[str, Any]], tools: list[Schema]) -> _Talk | None:
        """Append what the environment has said in one of the conversations, None where it is another one."""
        for talk in reversed(self._talks):
            before, new = messages[: len(talk.messages)], messages[len(talk.messages) :]
            others = all(message["role"] in ("user", "tool") for message in new)
            if new and others and before == talk.messages and tools == talk.tools:
                names = {call["id"]: call["function"]["name"] for one in before for call in one.get("tool_calls", ())}
                if not talk.chat.add([_named(message, names) for message in new]):
                    raise vf.OverlongPromptError("the messages do not fit into the context")
                return talk
        return None

    def _begin(self, messages: list[dict[str, Any]], tools: list[Schema]) -> _Talk:
        prompt = msgspec.structs.replace(self._prompt, metadata=self._prompt.metadata | {"messages": messages})
        chat = Chat(self._context, prompt, tools=tools, **self._formats)
        self._talks.append(_Talk(chat, tools, []))
        return self._talks[-1]


def _response_message(reply: Reply) -> Any:
    calls = [vf.ToolCall(id=call.id, name=call.name, arguments=call.text) for call in reply.calls]
    return vf.ResponseMessage(
        content=reply.content,
        reasoning_content=reply.message.reasoning or None,
        tool_calls=calls or None,
        finish_reason="length" if not reply.complete else "tool_calls" if calls else "stop",
        is_truncated=not reply.complete,
    )


def _message(message: Any) -> dict[str, Any]:
    """Return a message of verifiers as OpenAI's API has it, without reasoning, which environments may leave out.
    Raises ValueError for contents other than text."""
    plain: dict[str, Any] = {"role": message.role, "content": _text(message.content)}
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    if (call_id := message.get("tool_call_id")) is not None:
        plain["tool_call_id"] = call_id
    return plain


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part if isinstance(part, Mapping) else part.model_dump() for part in content]
    if other := [part for part in parts if part.get("type") != "text"]:
        raise ValueError(f"a message has content of the type {other[0].get('type')!r}; only text is supported")
    return "".join(part["text"] for part in parts)


def _named(message: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the result of a call with the name of its tool, which some templates write."""
    name = names.get(message.get("tool_call_id", ""))
    return {**message} if name is None else {**message, "name": name}


def _limits(sampling_args: Mapping[str, Any]) -> dict[str, Any]:
    """Raises ValueError for what would change the distribution that the run samples from."""
    given = {name: value for name, value in sampling_args.items() if value is not None}
    known = {*_LIMITS, "stop"}
    if other := {name for name, value in given.items() if name not in known and _WITHOUT_EFFECT.get(name) != value}:
        raise ValueError(
            f"the environment sets {', '.join(sorted(other))}; [rollout] decides how responses are sampled"
        )
    limits: dict[str, Any] = {"max_new_tokens": min((given[name] for name in _LIMITS if name in given), default=None)}
    stop = given.get("stop", [])
    return limits | {"stop": [stop] if isinstance(stop, str) else stop}


def _row(prompt: Prompt) -> dict[str, Any]:
    """Return what the environment gets of its dataset. Raises ValueError for a row that does not have it."""
    if not isinstance(own := prompt.metadata.get(COLUMN), Mapping):
        raise ValueError(
            f"prompt {prompt.uid} has no column {COLUMN!r}; write the data by "
            "`python -m miles_spmd.environments.verifiers`"
        )
    return {**own, "prompt": prompt.metadata["messages"], LABEL: prompt.label}


@cache  # one for all episodes of this process
def _environment(env: str, env_args: bytes) -> Any:
    """Raises ValueError."""
    arguments = msgspec.json.decode(env_args)
    try:
        with _own_signals():
            if ":" in env:
                return import_function("env", env, ())(**arguments)
            return vf.load_environment(env, **arguments)
    except PlugPointError:
        raise
    except Exception as error:
        raise ValueError(f"env = {env!r} cannot be loaded: {type(error).__name__}: {error}") from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handlers of signals: an environment of verifiers sets some when it is made."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rows(
    env: str, count: int = -1, *, held_out: bool = False, env_args: Mapping[str, Any] | None = None
) -> Iterable[Any]:
    """Yield ``count`` rows (-1: all) of an environment's dataset, or of its evaluation set, as this environment reads
    them. Raises ValueError."""
    environment = _environment(env, msgspec.json.encode(env_args or {}))
    dataset = environment.get_eval_dataset(count) if held_out else environment.get_dataset(count)
    for row in dataset:
        own = {name: value for name, value in row.items() if name not in ("prompt", LABEL)}
        messages = [{name: value for name, value in one.items() if value is not None} for one in row["prompt"]]
        yield {"prompt": messages, "label": row.get(LABEL), COLUMN: own}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a JSON-lines file. Ends with the message of a ValueError."""
    parser = argparse.ArgumentParser(prog="python -m miles_spmd.environments.verifiers")
    parser.add_argument("file", type=Path, help="JSON-lines file to write")
    parser.add_argument("env", help="name of an environment, or module:function that returns one")
    parser.add_argument("--count", type=int, default=-1, help="number of rows; all by default")
    parser.add_argument("--held-out", action="store_true", help="the evaluation set")
    parser.add_argument("--env-args", default="{}", help="arguments of the environment as JSON")
    given = parser.parse_args(arguments)
    try:
        env_args = msgspec.json.decode(given.env_args, type=dict)
        found = rows(given.env, given.count, held_out=given.held_out, env_args=env_args)
        lines = [msgspec.json.encode(row, enc_hook=str) + b"\n" for row in found]
    except ValueError as error:
        sys.exit(f"Error: {error}")
    given.file.write_bytes(b"".join(lines))
    print(f"{given.file}: {len(lines)} rows")


if __name__ == "__main__":
    main()
