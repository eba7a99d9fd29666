"""Samples for people: responses of the evaluations, the best and the worst ones of training, and rewards by number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import msgspec
import numpy as np

from miles_spmd.config import Config
from miles_spmd.telemetry.json_lines import LineWriter, cut
from miles_spmd.types.printable import printable
from miles_spmd.types.sample import Sample, by_role

TRANSCRIPTS_FILE, ROLLOUTS_FILE = "transcripts.jsonl", "rollouts.jsonl"
MAX_TEXT = 4000  # characters of a training response or its prompt that are kept
MAX_VALUES = 12  # a histogram has a bar per value where there are at most so many, else so many ranges


class Message(msgspec.Struct, frozen=True):
    role: str
    content: str


class Transcript(msgspec.Struct, frozen=True):
    step: int
    source: str  # name of the evaluation set, "" in training
    uid: str
    prompt: str
    response: str
    label: str
    reward: float | None
    finish_reason: str
    tokens: int  # of the response
    messages: list[Message] = []  # of the prompt, where it is a conversation
    turn_rewards: list[float | None] = []  # of all turns; empty where none has one
    role: str = ""  # "" where there is one player


class Rollout(msgspec.Struct, frozen=True):
    """The rewards of a step's samples, and the samples with the highest and the lowest one."""

    step: int
    rewards: list[tuple[float, float, int]]  # lowest and highest reward, and number of samples, of each bar
    best: Transcript
    worst: Transcript


def write_transcripts(config: Config, step: int, sets: Mapping[str, Sequence[Sequence[Sample]]]) -> None:
    """Append the first response to each of the first ``num_transcripts`` prompts of every set to ``transcripts.jsonl``,
    where there are roles the first of each.

    These are the same prompts in every evaluation.
    """
    with closing(LineWriter(config.run_dir / TRANSCRIPTS_FILE)) as lines:
        for name, groups in sets.items():
            for group in groups[: config.telemetry.num_transcripts]:
                for first, *_ in by_role(group):
                    lines.write(_transcript(step, name, first))


def write_rollout(config: Config, step: int, groups: Sequence[Sequence[Sample]]) -> None:
    """Append the rewards of a step, and its best and worst sample, to ``rollouts.jsonl``; nothing without rewards, or
    where ``num_transcripts`` is 0."""
    scored = [sample for group in groups for sample in group if sample.reward is not None]
    if not scored or not config.telemetry.num_transcripts:
        return
    ordered = sorted(scored, key=_reward)
    worst, best = (_transcript(step, "", sample, MAX_TEXT) for sample in (ordered[0], ordered[-1]))
    with closing(LineWriter(config.run_dir / ROLLOUTS_FILE)) as lines:
        lines.write(Rollout(step, histogram([_reward(sample) for sample in scored]), best, worst))


def cut_transcripts(config: Config, step: int) -> None:
    """Remove what was written after ``step`` steps from both files. Raises OSError."""
    for name in (TRANSCRIPTS_FILE, ROLLOUTS_FILE):
        cut(config.run_dir / name, step)


def histogram(values: Sequence[float]) -> list[tuple[float, float, int]]:
    """Return lower end, upper end and number of values of each bar: one per value where there are few of them."""
    counts = Counter(values)
    if len(counts) <= MAX_VALUES:
        return [(value, value, counts[value]) for value in sorted(counts)]
    numbers, edges = np.histogram(values, MAX_VALUES)
    return [(float(a), float(b), int(n)) for a, b, n in zip(edges, edges[1:], numbers)]


def _reward(sample: Sample) -> float:
    return float(sample.reward or 0.0)


def _transcript(step: int, source: str, sample: Sample, limit: int = 2**31) -> Transcript:
    messages = sample.trajectory.messages[:-1] or sample.prompt.metadata.get("messages")  # the last is the response
    return Transcript(
        step=step,
        source=source,
        uid=sample.prompt.uid,
        prompt=printable(sample.prompt.text, limit),
        response=printable(sample.text, limit),
        label="" if sample.prompt.label is None else printable(str(sample.prompt.label), MAX_TEXT),
        reward=sample.reward,
        finish_reason=str(sample.finish_reason),
        tokens=len(sample.response),
        messages=[_message(message, limit) for message in messages] if isinstance(messages, list) else [],
        turn_rewards=sample.trajectory.turn_rewards,
        role=printable(sample.role, MAX_TEXT),
    )


def _message(message: Any, limit: int) -> Message:
    """Return role and text of a message; other contents than text, such as calls of tools, as JSON."""
    if not isinstance(message, Mapping):
        return Message("", printable(str(message), limit))
    others = {name: value for name, value in message.items() if name not in ("role", "content") and value is not None}
    content = message.get("content")
    parts = [content if isinstance(content, str) else content and _json(content), others and _json(others)]
    return Message(str(message.get("role", "")), printable("\n".join(part for part in parts if part), limit))


def _json(value: Any) -> str:
    return msgspec.json.encode(value, enc_hook=str).decode()
