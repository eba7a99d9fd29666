"""The unit of work: a trajectory that began with a prompt, from request to reward.

An *episode* is one call of the environment for a prompt, and has an index among the episodes of that prompt. A
*rollout* is what one role has of an episode: one trajectory, or several (siblings), with one reward. Where an
environment names no roles, every episode is one rollout. A *group* is all rollouts of a prompt; those of one role are
compared.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
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
    index: int  # of its episode, 0 .. n_samples_per_prompt - 1
    trajectory: Trajectory
    reward: float | None = None
    reward_detail: dict[str, float] = {}

    @property
    def role(self) -> str:
        """The player whose trajectory it is, "" where there is one player."""
        return self.trajectory.role

    @property
    def game(self) -> str:
        """What is played, "" where the row of the prompt has no text in its column ``game``."""
        game = self.prompt.metadata.get("game")
        return game if isinstance(game, str) else ""

    @property
    def rollout(self) -> tuple[str, int, str]:
        """What names its rollout: prompt, episode and role. Siblings have the same."""
        return self.prompt.uid, self.index, self.role

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


def by_role(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Divide a group by role, in the order in which the roles come first: into what is compared."""
    return _divided(samples, lambda sample: sample.role)


def by_rollout(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Divide samples into rollouts, each of which is a list of siblings, in the order in which they come first."""
    return _divided(samples, lambda sample: sample.rollout)


def rollouts(samples: Sequence[Sample]) -> list[Sample]:
    """Return the first sample of each rollout: siblings share a reward, which counts once."""
    return [first for first, *_ in by_rollout(samples)]


def episodes(samples: Sequence[Sample]) -> list[Sample]:
    """Return the first sample of each episode, which has what the environment counted."""
    return [first for first, *_ in _divided(samples, lambda sample: sample.rollout[:2])]


def _divided(samples: Sequence[Sample], key: Callable[[Sample], Hashable]) -> list[list[Sample]]:
    parts: dict[Hashable, list[Sample]] = {}
    for sample in samples:
        parts.setdefault(key(sample), []).append(sample)
    return list(parts.values())
