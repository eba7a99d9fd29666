"""Agents as environments: they know an address, a key and OpenAI's own client, and nothing else of the run."""

from __future__ import annotations

import asyncio
from typing import Any

import openai

from miles_spmd.plugins.environment import Context
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
