"""The reward ``remote``: the score that a service of the user returns."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

from miles_spmd.config import RewardConfig
from miles_spmd.plugins.plug_point import PlugPointError
from miles_spmd.plugins.reward import RewardValue
from miles_spmd.rewards.adapters import BadReward
from miles_spmd.services.client import JsonClient, ServiceError
from miles_spmd.types.sample import Prompt, Sample

ServiceReward = Callable[[Sample], Awaitable[RewardValue]]
_SHARE = 0.9  # of reward_timeout that a request may take: its error names the cause


def remote(config: RewardConfig) -> ServiceReward:
    """Return the reward that asks ``reward.remote_url``. Raises PlugPointError where settings are missing."""
    client = service("remote", config, required(config, "remote_url"))

    async def score(sample: Sample) -> RewardValue:
        body = {
            "prompt": sample.prompt.text,  # as slime sends it
            "messages": conversation(sample.prompt),
            "response": sample.text,
            "label": sample.prompt.label,
            "metadata": {name: value for name, value in sample.prompt.metadata.items() if name != "messages"},
        }
        reply: RewardValue = await asked(client, body)
        return reply

    return score


def service(name: str, config: RewardConfig, url: str) -> JsonClient:
    """Return the client of the service of the reward ``name``. Raises PlugPointError where its key is not visible."""
    variable, headers = getattr(config, f"{name}_key_variable"), {}
    if variable is not None:
        if variable not in os.environ:
            raise PlugPointError(
                f"reward.{name}_key_variable = {variable!r} is not in the environment of reward processes; export it, "
                "and name it in reward.reward_environment"
            )
        headers["Authorization"] = f"Bearer {os.environ[variable]}"
    return JsonClient(
        url, time_limit=_SHARE * config.reward_timeout, concurrency=config.service_requests, headers=headers
    )  # fmt: skip


async def asked(client: JsonClient, body: Any) -> Any:
    """Return the service's reply to ``body``. Raises BadReward, which names URL and cause."""
    try:
        return await client.post(body)
    except ServiceError as error:
        raise BadReward(f"got no reply from {error}") from error


def required(config: RewardConfig, setting: str) -> str:
    if not (value := getattr(config, setting)):
        raise PlugPointError(f"reward.{setting} is not set, and the reward {setting.partition('_')[0]!r} requires it")
    return str(value)


def conversation(prompt: Prompt) -> list[dict[str, Any]] | None:
    """Return the messages of a prompt, None of a plain text."""
    return prompt.metadata.get("messages")
