"""A trajectory: the tokens that a policy saw and sampled, in the order in which they came.

It only ever grows at its end, by whole segments, so that a sampled token stays where it was sampled, behind the same
tokens, and is never decoded and tokenized again. A response to a single prompt is the smallest case: one segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import chain
from typing import Any

import msgspec


class FinishReason(StrEnum):
    """Why the engine stopped generating."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_new_tokens or the context was reached
    ABORT = "abort"  # stopped from outside; the tokens so far are kept


class Segment(msgspec.Struct, frozen=True):
    """Consecutive tokens of one origin: sampled by the policy, or given to it, such as the result of a tool.

    ``log_probs`` and ``top1_ids`` have the length of ``tokens``.
    """

    tokens: list[int]
    sampled: bool = True  # by the policy
    trained: bool = True  # where sampled: whether the loss counts these tokens
    log_probs: list[float] = []  # the engine's, natural log; of sampled tokens, and only where the engine's are known
    weight_versions: list[tuple[int, int]] = []  # (version, number of tokens), in order; of sampled tokens
    top1_ids: list[int] | None = None  # the engine's top-1 token at each place, if requested
    reward: float | None = None  # of the turn, where one is sampled
    path: str = ""  # of a turn whose seed does not follow from trajectory and turn


class Trajectory(msgspec.Struct):
    """``start``, the tokens that it begins with, and the segments behind them.

    Below, T is the number of tokens behind ``start``, and entry t of a list belongs to token t of them.
    """

    start: list[int]
    segments: list[Segment] = []
    number: int = 0  # among the trajectories of its episode
    role: str = ""  # of the player whose trajectory it is; "": the episode has one player
    text: str | None = None  # what is scored; None: the text of what the policy sampled last
    messages: list[dict[str, Any]] = []  # the conversation, where the environment keeps it as messages
    finish_reason: FinishReason = FinishReason.STOP  # of what the policy sampled last
    reward: float | None = None  # given by the environment; None: the sum of the turns', or of the reward functions
    reward_detail: dict[str, float] = {}
    metrics: dict[str, float] = {}  # what the environment has counted, in the first trajectory of an episode

    def append(self, segment: Segment) -> None:
        """Let it grow. Raises ValueError where the segment's lists differ in length."""
        lengths = {"log_probs": len(segment.log_probs), "top1_ids": len(segment.top1_ids or ())}
        wrong = {name: length for name, length in lengths.items() if length not in (0, len(segment.tokens))}
        if wrong:
            raise ValueError(f"a segment of {len(segment.tokens)} tokens has other numbers of {wrong}")
        self.segments.append(segment)

    def reward_turn(self, reward: float, turn: int = -1) -> None:
        """Give turn number ``turn`` (-1: the newest one) a reward, in place of one that it may have. Raises IndexError
        where there are fewer turns."""
        place = [place for place, segment in enumerate(self.segments) if segment.sampled][turn]
        self.segments[place] = msgspec.structs.replace(self.segments[place], reward=reward)

    @property
    def turns(self) -> int:
        """Number of segments that the policy has sampled."""
        return sum(segment.sampled for segment in self.segments)

    @property
    def turn_rewards(self) -> list[float | None]:
        """The reward of each turn; empty where none has one."""
        rewards = [segment.reward for segment in self.segments if segment.sampled]
        return rewards if any(reward is not None for reward in rewards) else []

    @property
    def rewards(self) -> list[float]:
        """The reward of the turn that ends with the token, 0 at other tokens, [T]."""
        rewards, end = [0.0] * sum(len(segment.tokens) for segment in self.segments), 0
        for segment in self.segments:
            end += len(segment.tokens)
            if segment.reward is not None and end:
                rewards[end - 1] += segment.reward
        return rewards

    def turn_at(self, place: int) -> tuple[int, Segment]:
        """Return the number of the turn that sampled the token at ``place`` of :attr:`tokens`, and its segment. Raises
        ValueError for a token that was not sampled."""
        turn, end = -1, len(self.start)
        for segment in self.segments:
            turn, end = turn + segment.sampled, end + len(segment.tokens)
            if place < end:
                break
        if not (segment.sampled and end - len(segment.tokens) <= place < end):
            raise ValueError(f"token {place} was not sampled")
        return turn, segment

    @property
    def tokens(self) -> list[int]:
        """All tokens, those of ``start`` first."""
        return self.start + self.response

    @property
    def response(self) -> list[int]:
        """The tokens behind ``start``, [T]."""
        return _joined([segment.tokens for segment in self.segments])

    @property
    def loss_mask(self) -> list[int]:
        """1 where the policy sampled the token and it is trained, [T]."""
        return _joined([[int(s.sampled and s.trained)] * len(s.tokens) for s in self.segments])

    @property
    def log_probs(self) -> list[float]:
        """The engine's log-prob of each token, 0 where the policy did not sample it, [T]."""
        return _joined([s.log_probs if s.log_probs else [0.0] * len(s.tokens) for s in self.segments])

    @property
    def top1_ids(self) -> list[int] | None:
        """The engine's top-1 token at each place, the token itself where the policy did not sample it, [T]; None unless
        they were requested."""
        if not any(segment.top1_ids for segment in self.segments):
            return None
        return _joined([segment.top1_ids or segment.tokens for segment in self.segments])

    @property
    def weight_versions(self) -> list[tuple[int, int]]:
        """The versions of the weights that sampled the tokens, and how many each has sampled, in order."""
        spans: list[tuple[int, int]] = []
        for version, count in chain.from_iterable(segment.weight_versions for segment in self.segments):
            if spans and spans[-1][0] == version:
                spans[-1] = version, spans[-1][1] + count
            else:
                spans.append((version, count))
        return spans


def train_once(siblings: Sequence[Trajectory]) -> None:
    """Let siblings train once what they have in common: segments that are the same objects stay trained in the first
    that has them."""
    seen = dict[int, Segment]()  # which has them, so that no other segment gets their address
    for trajectory in siblings:
        own = {id(segment): segment for segment in trajectory.segments}
        trajectory.segments = [
            msgspec.structs.replace(segment, trained=False) if id(segment) in seen else segment
            for segment in trajectory.segments
        ]
        seen |= own


def _joined(lists: list[list[Any]]) -> list[Any]:
    return lists[0] if len(lists) == 1 else list(chain.from_iterable(lists))


def by_version(segment: Segment, version: int) -> list[Segment]:
    """Cut a segment where the weights change that sampled it; only those of ``version`` stay trained, and the last one
    has the turn's reward."""
    if all(one == version for one, _ in segment.weight_versions):
        return [segment]
    parts, start = list[Segment](), 0
    for one, count in segment.weight_versions:
        end = start + count
        parts.append(
            Segment(
                segment.tokens[start:end],
                segment.sampled,
                segment.trained and one == version,
                segment.log_probs[start:end],
                [(one, count)],
                segment.top1_ids and segment.top1_ids[start:end],
                segment.reward if end == len(segment.tokens) else None,
                segment.path,
            )
        )
        start = end
    return parts
