"""The unit of work: a trajectory that began with a prompt, from request to reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from miles_spmd.types.trajectory import FinishReason, Trajectory


class Prompt(msgspec.Struct, frozen=True):
    """One row of a dataset, tokenized."""

    uid: str  # "name:row", the same in every epoch and on every machine
    text: str  # the model's input, with the chat template applied
    tokens: list[int]
    label: Any = None
    metadata: dict[str, Any] = {}


class Sample(msgspec.Struct):
    """A trajectory and its reward.

    ``response``, ``rollout_log_probs``, ``loss_mask`` and ``top1_ids`` are about the tokens behind the trajectory's
    start, which are those of the response to a single prompt, and have the same length.
    """

    prompt: Prompt
    index: int  # 0 .. n_samples_per_prompt - 1 within its group; siblings, the samples of one rollout, share it
    trajectory: Trajectory
    reward: float | None = None
    reward_detail: dict[str, float] = {}

    @property
    def sequence(self) -> list[int]:
        """All token ids, those of the prompt first."""
        return self.trajectory.tokens

    @property
    def response(self) -> list[int]:
        return self.trajectory.response

    @property
    def rollout_log_probs(self) -> list[float]:
        """The engine's log-prob of each sampled token, natural log; 0 for other tokens."""
        return self.trajectory.log_probs

    @property
    def loss_mask(self) -> list[int]:
        """1 where the policy sampled the token and it is trained."""
        return self.trajectory.loss_mask

    @property
    def top1_ids(self) -> list[int] | None:
        """The engine's top-1 token at each position, if requested."""
        return self.trajectory.top1_ids

    @property
    def text(self) -> str:
        """What is scored: the response as text, of several turns the last one's."""
        return self.trajectory.text or ""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation, where there is one."""
        return self.trajectory.messages or self.prompt.metadata.get("messages") or []

    @property
    def finish_reason(self) -> FinishReason:
        return self.trajectory.finish_reason

    @property
    def weight_versions(self) -> list[tuple[int, int]]:
        """(version, number of tokens), in order."""
        return self.trajectory.weight_versions

    @property
    def turns(self) -> int:
        """Number of segments that the policy has sampled."""
        return self.trajectory.turns

    def without_log_probs(self) -> Sample:
        """Return a copy for who needs the tokens only."""
        segments = [msgspec.structs.replace(segment, log_probs=[]) for segment in self.trajectory.segments]
        return msgspec.structs.replace(self, trajectory=msgspec.structs.replace(self.trajectory, segments=segments))


def rollouts(group: Sequence[Sample]) -> list[Sample]:
    """Return the first sample of each rollout of a prompt: siblings share a reward, which counts once."""
    return list({sample.index: sample for sample in reversed(group)}.values())[::-1]
