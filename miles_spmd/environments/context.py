"""The environment's side of an episode: a :class:`~miles_spmd.plugins.environment.Context` that sends what happens."""

from __future__ import annotations

import math
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from miles_spmd.data.template import Conversation, fixed_clock
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.environments.messages import Ask, Begin, Completed, End, Failed, Finished, Line
from miles_spmd.plugins.environment import Completion
from miles_spmd.types.trajectory import FinishReason, Segment, Trajectory


class ContextError(RuntimeError):
    """An environment that misuses its context. The message says how."""


class ModelView(NamedTuple):
    """What environments know about the model."""

    tokenizer: Tokenizer
    vocab_size: int  # rows of its embedding
    context_length: int  # tokens that a trajectory can have, its start included
    date: str  # what the chat template reads as today


class ModelSource(NamedTuple):
    """Where a process finds what its environment knows about the model."""

    folder: Path  # of the checkpoint
    vocab_size: int
    context_length: int
    date: str

    def load(self) -> ModelView:
        """Raises TokenizerError."""
        return ModelView(Tokenizer(self.folder), self.vocab_size, self.context_length, self.date)


class EpisodeContext:
    """The context of one call of an environment.

    ``ask`` sends a request to the run, and returns what the policy has sampled.
    """

    def __init__(self, begin: Begin, model: ModelView, ask: Callable[[Ask], Awaitable[Completed]]) -> None:
        self.index = begin.index
        self._episode, self._max_tokens = begin.episode, begin.max_tokens
        self._tokenizer, self._context_length, self._send = model.tokenizer, model.context_length, ask
        self._vocab_size, self._prompt = model.vocab_size, begin.prompt.tokens
        variables = begin.prompt.metadata.get("chat_template_kwargs")
        own = variables if isinstance(variables, dict) else {}
        self._template_variables = own | {"strftime_now": fixed_clock(model.date)}
        self._trajectories = self._segments = 0
        # Segments are known by the lists of their tokens, which are kept here, so that no other list has their address.
        self._known: dict[int, tuple[list[int], int]] = {}
        self._metrics: dict[str, float] = {}

    # --- for environments --------------------------------------------------------------------------------------------

    def begin(self, tokens: Sequence[int]) -> Trajectory:
        if tokens is not self._prompt:  # whose tokens are the data's, and were examined with it
            self._check(tokens)
        self._trajectories += 1
        return Trajectory(tokens if isinstance(tokens, list) else [*tokens], number=self._trajectories - 1)

    def fork(self, trajectory: Trajectory) -> Trajectory:
        sibling = self.begin(trajectory.start)
        sibling.segments, sibling.messages = [*trajectory.segments], [*trajectory.messages]
        sibling.text, sibling.finish_reason = trajectory.text, trajectory.finish_reason
        return sibling

    async def complete(
        self, trajectory: Trajectory, *, max_new_tokens: int | None = None, stop: Sequence[str] = ()
    ) -> Completion:
        limit = min(self.room(trajectory), math.inf if max_new_tokens is None else max_new_tokens)
        if limit < 1:
            trajectory.finish_reason = FinishReason.LENGTH
            return Completion([], FinishReason.LENGTH)
        line, given = self._line(trajectory)
        number, length = self._next_segment(), len(trajectory.segments)
        done = await self._send(Ask(self._episode, number, line, given, int(limit), [*stop]))
        if len(trajectory.segments) != length:
            raise ContextError("a trajectory was changed while the policy continued it; fork it before")
        self._known[id(done.tokens)] = done.tokens, number
        trajectory.append(Segment(done.tokens))
        trajectory.finish_reason = done.finish_reason
        return Completion(done.tokens, done.finish_reason)

    def room(self, trajectory: Trajectory) -> int:
        grown = sum(len(segment.tokens) for segment in trajectory.segments)
        return min(self._max_tokens, self._context_length - len(trajectory.start)) - grown

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> str:
        conversation = Conversation([*messages], [*tools] or None, self._template_variables)
        return self._tokenizer.chat_template.render(conversation, add_generation_prompt)[0]

    def encode(self, text: str, *, literal: Sequence[tuple[int, int]] = (), at_start: bool = False) -> list[int]:
        if at_start:
            return self._tokenizer.encode_prompts([text], [True])[0]
        return self._tokenizer.encode_continuation(text, literal)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def count(self, name: str, value: float = 1.0) -> None:
        self._metrics[name] = self._metrics.get(name, 0.0) + value

    # --- for those who call them -------------------------------------------------------------------------------------

    def finished(self, returned: Any) -> Finished | Failed:
        """Return the message about what the environment has returned."""
        trajectories = [returned] if isinstance(returned, Trajectory) else returned
        if not isinstance(trajectories, list | tuple) or not trajectories:
            return self._unusable(f"returned {type(returned).__name__} instead of a trajectory, or a list of them")
        ends, given, turn_rewards = list[End](), dict[int, list[int]](), dict[int, float]()
        try:
            for trajectory in trajectories:
                line, new = self._line(trajectory)
                given |= new
                sampled = [(n, segment) for n, segment in zip(line.segments, trajectory.segments) if segment.sampled]
                for number, segment in sampled:
                    if segment.reward is None:
                        continue
                    reward = _finite(segment.reward, "a turn")
                    if turn_rewards.setdefault(number, reward) != reward:
                        raise ContextError("gave a turn that siblings have in common two different rewards")
                ends.append(
                    End(
                        line=line,
                        untrained=[number for number, segment in sampled if not segment.trained],
                        text=self._scored(trajectory),
                        messages=trajectory.messages,
                        finish_reason=trajectory.finish_reason,
                        reward=None if trajectory.reward is None else _finite(trajectory.reward, "a trajectory"),
                        reward_detail={str(name): float(value) for name, value in trajectory.reward_detail.items()},
                    )
                )
        except ContextError as error:
            return self._unusable(str(error))
        except (AttributeError, TypeError, ValueError) as error:
            return self._unusable(f"returned something else than a trajectory: {error}")
        if not any(segment.sampled for trajectory in trajectories for segment in trajectory.segments):
            return self._unusable("returned no token that the policy has sampled")
        return Finished(self._episode, ends, given, self._metrics, turn_rewards)

    def failed(self, error: BaseException) -> Failed:
        """Return the message about what the environment has raised."""
        if isinstance(error, ContextError):
            return self._unusable(str(error))
        trace = "".join(traceback.format_exception(error))
        return Failed(self._episode, "raised", f"raised {type(error).__name__}: {error}", trace)

    def _unusable(self, problem: str) -> Failed:
        return Failed(self._episode, "unusable", problem)

    def _scored(self, trajectory: Trajectory) -> str:
        """The text of ``trajectory`` that reward functions get."""
        if trajectory.text is not None:
            return trajectory.text
        sampled = next((one.tokens for one in reversed(trajectory.segments) if one.sampled), [])
        return self._tokenizer.decode(sampled, skip_special_tokens=True)

    def _line(self, trajectory: Trajectory) -> tuple[Line, dict[int, list[int]]]:
        """Return the trajectory by the numbers of its segments, and the tokens of those that are new. Raises
        ContextError."""
        numbers, given = list[int](), dict[int, list[int]]()
        for segment in trajectory.segments:
            known = self._known.get(id(segment.tokens))
            if known is None:
                if segment.sampled:
                    raise ContextError("a segment claims to be sampled by the policy, and was not")
                self._check(segment.tokens)
                known = self._known[id(segment.tokens)] = segment.tokens, self._next_segment()
                given[known[1]] = segment.tokens
            numbers.append(known[1])
        return Line(trajectory.number, trajectory.start, numbers), given

    def _check(self, tokens: Sequence[int]) -> None:
        """Raise ContextError for tokens that the model does not have, which would be an error of the engine."""
        if wrong := [t for t in tokens if not isinstance(t, int) or not 0 <= t < self._vocab_size]:
            raise ContextError(f"gave the token {wrong[0]!r}; the model has the tokens 0 to {self._vocab_size - 1}")

    def _next_segment(self) -> int:
        self._segments += 1
        return self._segments - 1


def _finite(reward: float, what: str) -> float:
    """Return a reward as a float. Raises ContextError unless it is a finite number."""
    if not math.isfinite(reward):
        raise ContextError(f"gave {what} the reward {reward}; rewards are finite numbers")
    return float(reward)
