"""The responses of a rollout that was left before its step was complete, as the bytes that a checkpoint has of them.

They are continued where that gives the response that would have come without the interruption: with the same weights,
which are the checkpoint's, and for the same request, whose seed is a function of its prompt. How the engine computes
must not have changed either.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from miles_spmd.config import Config
from miles_spmd.controller.generation.backlog import Backlog
from miles_spmd.types.request import Begun, Output, Request
from miles_spmd.types.sample import Sample
from miles_spmd.types.trajectory import FinishReason


class Reward(msgspec.Struct, frozen=True):
    """Of a rollout."""

    value: float
    detail: dict[str, float]
    turns: list[float | None]  # of all turns of its first trajectory; empty where none has one

    @classmethod
    def of(cls, sample: Sample) -> Reward | None:
        """That of the rollout whose first sample is ``sample``, if it has one."""
        if sample.reward is None:
            return None
        return cls(sample.reward, sample.reward_detail, sample.trajectory.turn_rewards)

    def give(self, sample: Sample) -> None:
        """Give it to the first sample of the rollout."""
        sample.reward, sample.reward_detail = self.value, self.detail
        for turn, reward in enumerate(self.turns):
            if reward is not None:
                sample.trajectory.reward_turn(reward, turn)


class Response(msgspec.Struct, frozen=True):
    """A response, complete unless its ``finish_reason`` is ABORT."""

    output: Output
    rewards: dict[str, Reward] = {}  # of the episode that it ends, by role, those that it had

    @property
    def complete(self) -> bool:
        return self.output.finish_reason is not FinishReason.ABORT

    @property
    def begun(self) -> Begun:
        return Begun(self.output.output_ids, self.output.output_log_probs, self.output.top1_ids)


class UnfinishedRollout(msgspec.Struct, frozen=True):
    """What is there of the rollout of ``step``: responses by the digests of their requests, and the groups that steps
    before it have left behind."""

    step: int
    engine: dict[str, Any]  # settings that decide how it computes, by their names
    responses: dict[str, Response]
    backlog: Backlog = Backlog()

    def encode(self) -> bytes:
        return zlib.compress(msgspec.msgpack.encode(self), 1)

    @classmethod
    def decode(cls, data: bytes) -> UnfinishedRollout:
        """Raises ValueError for what another version wrote."""
        try:
            return msgspec.msgpack.decode(zlib.decompress(data), type=cls)
        except (msgspec.DecodeError, zlib.error) as error:
            raise ValueError(f"was written by another version: {error}") from None


def key(request: Request) -> str:
    """Return a digest of all that decides the response, beside weights and engine."""
    content = msgspec.json.encode(msgspec.structs.replace(request, rid="", begun=None))
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def engine_settings(config: Config) -> dict[str, Any]:
    """Return the settings that decide how the engine computes."""
    determinism = config.determinism
    settings = {
        "model.dtype": config.model.dtype,
        "rollout.engine": config.rollout.engine,
        "determinism.parity": determinism.parity,
        "determinism.deterministic": determinism.deterministic,
        **{f"sglang.{name}": value for name, value in config.sglang.items()},
    }
    return msgspec.json.decode(msgspec.json.encode(settings, enc_hook=str))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in words which settings differ."""
    return [
        f"{name} was {before.get(name)}, now {now.get(name)}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]


def described(responses: Iterable[Response]) -> str:
    """Return the numbers in words: ``3 complete and 5 partial responses (37 tokens)``."""
    complete = [response.complete for response in responses]
    partial = [len(r.output.output_ids) for r in responses if not r.complete]
    tokens = f" ({sum(partial)} tokens)" if partial else ""
    return f"{sum(complete)} complete and {len(partial)} partial responses{tokens}"
