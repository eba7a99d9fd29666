"""Agents as environments: they know an address, a key and OpenAI's own client, and nothing else of the run."""

from __future__ import annotations

import asyncio
import contextvars
import json
from pathlib import Path
from typing import Any

import openai

from miles_spmd.plugins.environment import Context, Session
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import Trajectory


async def curious(context: Context, prompt: Prompt) -> list[Trajectory]:
    """A conversation of three turns, of which the second is asked for twice in two ways, beside two helpers at the same
    time, one of which is two."""
    async with (
        context.session() as session,
        openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0) as client,
    ):
        messages: list[Any] = [{"role": "user", "content": prompt.text}]
        await ask(client, messages)
        others = [ask(client, [{"role": "user", "content": f"{n} plus {n}"}], n=n) for n in (1, 2)]
        await asyncio.gather(*others)
        branch = [*messages, {"role": "user", "content": "times"}]
        messages.append({"role": "user", "content": "plus"})
        await ask(client, messages)
        await ask(client, branch)
        messages.append({"role": "user", "content": "minus"})
        await ask(client, messages, stream=True)
    trajectories = session.trajectories
    trajectories[0].reward = float(sum(trajectories[0].response) % 2)
    context.count("agent_trajectories", len(trajectories))
    return trajectories


async def ask(client: openai.AsyncOpenAI, messages: list[Any], n: int = 1, stream: bool = False) -> None:
    """Append the first of the responses, whose tokens and log-probs have to be there."""
    settings: dict[str, Any] = {"model": "policy", "max_tokens": 5, "n": n, "logprobs": True}
    if stream:
        parts = await client.chat.completions.create(messages=messages, stream=True, **settings)
        text = "".join([part.choices[0].delta.content or "" async for part in parts])
        messages.append({"role": "assistant", "content": text})
        return
    response = await client.chat.completions.create(
        messages=messages, extra_body={"return_token_ids": True}, **settings
    )
    for choice in response.choices:
        log_probs = [one.logprob for one in choice.logprobs.content]  # type: ignore[union-attr]
        assert len(log_probs) == len(choice.model_extra["token_ids"]) > 0  # type: ignore[index]
        assert all(log_prob <= 0 for log_prob in log_probs)
    messages.append(response.choices[0].message)


class Framework:
    """An agent of a framework in a program of its own, which serves all episodes of this process."""

    def __init__(self) -> None:
        self._program: asyncio.subprocess.Process | None = None
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading: asyncio.Task[None] | None = None
        self._count = 0

    async def run(self, python: str, framework: str, session: Session, prompt: str) -> dict[str, Any]:
        if self._program is None:
            path = str(Path(__file__).with_name("framework_agent.py"))
            self._program = await asyncio.create_subprocess_exec(
                python, path, framework, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**24
            )
            # outside of the episode that is first: its end would be the reader's
            self._reading = contextvars.Context().run(asyncio.ensure_future, self._read(self._program))
        self._count += 1
        number = self._count
        order = {"id": number, "base_url": session.base_url, "api_key": session.api_key, "prompt": prompt}
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        assert self._program.stdin is not None
        self._program.stdin.write(json.dumps(order).encode() + b"\n")
        return await waiting

    async def _read(self, program: asyncio.subprocess.Process) -> None:
        assert program.stdout is not None
        while line := await program.stdout.readline():
            done = json.loads(line)
            if not (waiting := self._waiting.pop(done["id"])).done():
                waiting.set_result(done)


FRAMEWORK = Framework()


async def framework(context: Context, prompt: Prompt, python: str, name: str) -> list[Trajectory]:
    """The calculator's task for an agent of a framework; ``python``: an interpreter that has it."""
    (message,) = prompt.metadata["messages"]
    async with context.session() as session:
        done = await FRAMEWORK.run(python, name, session, message["content"])
    context.count("agent_problems", bool(done["problem"]))
    trajectories = session.trajectories
    context.count("agent_trajectories", len(trajectories))
    trajectories[0].text = done["said"]
    return trajectories


async def texts(context: Context, prompt: Prompt, hold: str = "") -> list[Trajectory]:
    """A text that is continued, and then in two ways at the same time. It waits while the file ``hold`` exists."""
    async with (
        context.session() as session,
        openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0) as client,
    ):
        first = await client.completions.create(model="policy", prompt=prompt.text, max_tokens=4)
        if hold and Path(hold).exists():
            Path(f"{hold}.held").touch()
        while hold and Path(hold).exists():
            await asyncio.sleep(0.05)
        said = f"{prompt.text}{first.choices[0].text}"
        await asyncio.gather(
            client.completions.create(model="policy", prompt=f"{said} 42", max_tokens=3),
            client.completions.create(model="policy", prompt=f"{said} 43", max_tokens=5, n=2),
        )
    return session.trajectories


async def stray(context: Context, prompt: Prompt) -> list[Trajectory]:
    """Two turns, between which the agent does what the label says."""
    async with (
        context.session() as session,
        openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0) as client,
    ):
        await client.completions.create(model="policy", prompt="1 plus 1")
        match prompt.label:
            case "raise":
                raise ValueError("no luck")
            case "wait":
                await asyncio.sleep(100)
            case "leave":  # with a request that nobody waits for
                asyncio.ensure_future(client.completions.create(model="policy", prompt="2 plus 2"))  # noqa: RUF006
                await asyncio.sleep(0)
        await client.completions.create(model="policy", prompt="3 plus 3")
    return session.trajectories
