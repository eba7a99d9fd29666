"""What an environment and the run say to each other during an episode, one call of the environment.

A trajectory travels as the numbers of its segments within the episode, and the tokens of a segment travel once: those
that the environment gives from it, those that the policy samples to it. So the run, which holds the trajectories, adds
sampled tokens with their log-probs itself, and an environment cannot change them.
"""

from __future__ import annotations

from typing import Any

import msgspec

from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import FinishReason


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Call the environment. ``max_tokens``: what a trajectory can have behind its start. ``purpose``: one other than
    training, whose episodes do not wait for those of training to end."""

    episode: int  # a name for this call of the environment
    prompt: Prompt
    index: int
    max_tokens: int
    purpose: str = ""


class Completed(msgspec.Struct, frozen=True, tag=True):
    """What the policy has sampled, which is the segment that was asked for."""

    episode: int
    segment: int
    tokens: list[int]
    finish_reason: FinishReason
    log_probs: list[float] = []  # of the tokens, where they were asked for


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for this episode any more."""

    episode: int


class Line(msgspec.Struct, frozen=True):
    """A trajectory: whose it is, ``start``, and its segments by their numbers."""

    number: int
    start: list[int]
    segments: list[int]
    role: str = ""


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Let the policy continue ``line`` by the segment number ``segment``. ``path``: see ``sample_seed``."""

    episode: int
    segment: int
    line: Line
    given: dict[int, list[int]]  # tokens of segments that are new
    max_new_tokens: int
    stop: list[str] = []
    path: str = ""
    log_probs: bool = False  # whether the environment gets them, too


class End(msgspec.Struct, frozen=True):
    """A trajectory that is returned."""

    line: Line
    untrained: list[int]  # numbers of sampled segments that the environment leaves out of the loss
    text: str
    messages: list[dict[str, Any]]
    finish_reason: FinishReason
    reward: float | None
    reward_detail: dict[str, float]


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The environment has returned."""

    episode: int
    ends: list[End]
    given: dict[int, list[int]]
    metrics: dict[str, float]
    turn_rewards: dict[int, float] = {}  # by the numbers of sampled segments


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The environment has raised, or returned what cannot be used; ``kind`` names what the failures are counted by.
    ``own``: what has failed is this episode, and not another one of its process. ``exhausted``: the process has no
    memory left."""

    episode: int
    kind: str
    problem: str
    trace: str = ""
    own: bool = True
    exhausted: bool = False


Event = Ask | Finished | Failed
Order = Begin | Completed | Cancel

_decoder = msgspec.msgpack.Decoder(Event)


def encode(event: Event) -> bytes:
    """Return the bytes of an event. Raises ValueError for values that its fields do not have: an environment puts into
    trajectories what it likes, and its process must send nothing that cannot be read."""
    try:
        data = msgspec.msgpack.encode(event)
        _decoder.decode(data)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error
    return data


def decode(data: bytes) -> Event:
    """Raises msgspec.DecodeError."""
    return _decoder.decode(data)
