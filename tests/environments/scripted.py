"""A context whose policy samples what a test has written down, with a real tokenizer and a real chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from miles_spmd.data.template import Conversation
from miles_spmd.data.tokenizer import Text, Tokenizer
from miles_spmd.plugins.environment import Completion
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import FinishReason, Segment, Trajectory


class Turn(NamedTuple):
    tokens: list[int]
    finish_reason: FinishReason = FinishReason.STOP


class ScriptedContext:
    """Samples ``turns`` one after another; a turn may be a function of the trajectory. Records what it tokenizes."""

    index = 0

    def __init__(
        self, tokenizer: Tokenizer, turns: Sequence[Turn | Callable[[Trajectory], Turn]], room: int = 100_000
    ) -> None:
        self.tokenizer, self._turns, self._context = tokenizer, list(turns), room
        self.encoded: list[str] = []
        self.metrics: dict[str, float] = {}

    def begin(self, tokens: Sequence[int], *, role: str = "") -> Trajectory:
        return Trajectory(list(tokens), [], role=role)

    def fork(self, trajectory: Trajectory) -> Trajectory:
        raise NotImplementedError

    async def complete(
        self,
        trajectory: Trajectory,
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        path: str = "",
        log_probs: bool = False,
    ) -> Completion:
        turn = self._turns.pop(0)
        tokens, reason = turn(trajectory) if callable(turn) else turn
        if len(tokens) > (room := self.room(trajectory)):
            tokens, reason = tokens[:room], FinishReason.LENGTH
        if tokens:
            trajectory.append(Segment(tokens, log_probs=[-0.5] * len(tokens)))
        trajectory.finish_reason = reason
        return Completion(tokens, reason, [-0.5] * len(tokens) if log_probs else [])

    def room(self, trajectory: Trajectory) -> int:
        return self._context - len(trajectory.tokens)

    def render(
        self, messages: Sequence[dict[str, Any]], *, tools: Sequence[Any] = (), add_generation_prompt: bool = True
    ) -> str:
        conversation = Conversation(list(messages), list(tools) or None)
        return self.tokenizer.chat_template.render(conversation, add_generation_prompt)[0]

    def encode(
        self,
        text: str,
        *,
        literal: Sequence[tuple[int, int]] = (),
        at_start: bool = False,
        templated: bool = True,
    ) -> list[int]:
        self.encoded.append(text)
        if at_start and not templated:
            return self.tokenizer.encode_prompts([text], [False])[0]
        return self.tokenizer.encode_continuation(text, literal, at_start=at_start)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def count(self, name: str, value: float = 1.0) -> None:
        self.metrics[name] = self.metrics.get(name, 0.0) + value


def to_prompt(tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: Sequence[Any] = ()) -> Prompt:
    text = tokenizer.chat_template.render(Conversation(messages, list(tools) or None), True)[0]
    (encoding,) = tokenizer.encode_texts([Text([(text, False)], True)])
    return Prompt("set:1", text, encoding.ids, metadata={"messages": messages})
