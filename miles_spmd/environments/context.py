"""The environment's side of an episode: a :class:`~miles_spmd.plugins.environment.Context` that sends what happens."""

from __future__ import annotations

import math
import traceback
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from miles_spmd.data.template import Conversation, fixed_clock
from miles_spmd.data.tokenizer import Tokenizer
from miles_spmd.environments.messages import Ask, Begin, Completed, End, Failed, Finished, Line
from miles_spmd.plugins.environment import Completion, Session
from miles_spmd.types.printable import MAX_LINE, error_text, printable
from miles_spmd.types.trajectory import FinishReason, Segment, Trajectory

if TYPE_CHECKING:
    from miles_spmd.environments.sessions.endpoint import Endpoint

_LONGEST_PROBLEM = 1000  # characters of a problem, which may have what the environment wrote


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

    def __init__(
        self,
        begin: Begin,
        model: ModelView,
        ask: Callable[[Ask], Awaitable[Completed]],
        endpoint: Callable[[], Endpoint] | None = None,
    ) -> None:
        """``endpoint`` returns that of this process; None where it has no event loop."""
        self.index = begin.index
        self._episode, self._max_tokens = begin.episode, begin.max_tokens
        self._tokenizer, self._context_length, self._send = model.tokenizer, model.context_length, ask
        self._vocab_size = model.vocab_size
        variables = begin.prompt.metadata.get("chat_template_kwargs")
        own = variables if isinstance(variables, dict) else {}
        self._template_variables = own | {"strftime_now": fixed_clock(model.date)}
        self._endpoint, self._sessions = endpoint, 0
        self._begun: list[tuple[list[int], str]] = []  # start and role of the trajectories, by their numbers
        self._segments = 0
        # Segments are known by the lists of their tokens, which are kept here, so that no other list has their address.
        self._known: dict[int, tuple[list[int], int]] = {}
        self._behind: dict[int, Line] = {}  # what sampled segments, by their numbers, were sampled behind
        self._metrics: dict[str, float] = {}

    # --- for environments --------------------------------------------------------------------------------------------

    def begin(self, tokens: Sequence[int], *, role: str = "") -> Trajectory:
        start = [*tokens]
        if not start:
            raise ContextError("began a trajectory without a token, which the policy cannot continue")
        self._check(start)
        if not (isinstance(role, str) and role.isprintable()):
            raise ContextError(f"began a trajectory of the role {role!r:.80}; a role is printable text")
        self._begun.append((start, role))
        return Trajectory([*start], number=len(self._begun) - 1, role=role)

    def fork(self, trajectory: Trajectory) -> Trajectory:
        sibling = self.begin(trajectory.start, role=trajectory.role)
        sibling.segments, sibling.messages = [*trajectory.segments], [*trajectory.messages]
        sibling.text, sibling.finish_reason = trajectory.text, trajectory.finish_reason
        return sibling

    async def complete(
        self,
        trajectory: Trajectory,
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        path: str = "",
        log_probs: bool = False,
    ) -> Completion:
        if isinstance(stop, str):
            raise ContextError(f"gave context.complete stop = {stop!r}; it is a list of strings")
        limit = min(self.room(trajectory), math.inf if max_new_tokens is None else max_new_tokens)
        if limit < 1:
            trajectory.finish_reason = FinishReason.LENGTH
            return Completion([], FinishReason.LENGTH)
        line, given = self._line(trajectory)
        number, length = self._next_segment(), len(trajectory.segments)
        done = await self._send(Ask(self._episode, number, line, given, int(limit), [*stop], path, log_probs))
        if len(trajectory.segments) != length:
            raise ContextError("a trajectory was changed while the policy continued it; fork it before")
        self._known[id(done.tokens)], self._behind[number] = (done.tokens, number), line
        trajectory.append(Segment(done.tokens))
        trajectory.finish_reason = done.finish_reason
        return Completion(done.tokens, done.finish_reason, done.log_probs)

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

    def encode(
        self,
        text: str,
        *,
        literal: Sequence[tuple[int, int]] = (),
        at_start: bool = False,
        templated: bool = True,
    ) -> list[int]:
        if at_start and not templated:
            return self._tokenizer.encode_prompts([text], [False])[0]
        return self._tokenizer.encode_continuation(text, literal, at_start=at_start)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def count(self, name: str, value: float = 1.0) -> None:
        self._metrics[name] = self._metrics.get(name, 0.0) + _number(name, value)

    def session(
        self, *, call_format: str = "auto", reasoning_format: str = "auto"
    ) -> AbstractAsyncContextManager[Session]:
        from miles_spmd.environments.sessions.session import Session

        if self._endpoint is None:
            raise ContextError("opened a session in a process without an event loop")
        opened = Session(self, self._sessions, call_format=call_format, reasoning_format=reasoning_format)
        self._sessions += 1
        return self._endpoint().open(opened)

    # --- for those who call them -------------------------------------------------------------------------------------

    def finished(self, returned: Any) -> Finished | Failed:
        """Return the message about what the environment has returned."""
        trajectories = [returned] if isinstance(returned, Trajectory) else returned
        if not isinstance(trajectories, list | tuple) or not trajectories:
            return self.unusable(f"returned {type(returned).__name__} instead of a trajectory, or a list of them")
        ends, given, turn_rewards = list[End](), dict[int, list[int]](), dict[int, float]()
        try:
            for trajectory in trajectories:
                self._fit(trajectory)
                line, new = self._line(trajectory)
                given |= new
                sampled = [(n, segment) for n, segment in zip(line.segments, trajectory.segments) if segment.sampled]
                for number, segment in sampled:
                    if segment.reward is None:
                        continue
                    reward = _number("turn reward", segment.reward)
                    if turn_rewards.setdefault(number, reward) != reward:
                        raise ContextError("gave a turn that siblings have in common two different rewards")
                ends.append(
                    End(
                        line=line,
                        untrained=[number for number, segment in sampled if not segment.trained],
                        text=self._scored(trajectory),
                        messages=trajectory.messages,
                        finish_reason=trajectory.finish_reason,
                        reward=None if trajectory.reward is None else _number("reward", trajectory.reward),
                        reward_detail={name: _number(name, one) for name, one in trajectory.reward_detail.items()},
                    )
                )
        except ContextError as error:
            return self.unusable(str(error))
        except (AttributeError, TypeError, ValueError) as error:
            return self.unusable(f"returned something else than a trajectory: {error}")
        if not any(segment.sampled for trajectory in trajectories for segment in trajectory.segments):
            return self.unusable("returned no token that the policy has sampled")
        return Finished(self._episode, ends, given, self._metrics, turn_rewards)

    def failed(self, error: BaseException) -> Failed:
        """Return the message about what the environment has raised."""
        if isinstance(error, ContextError):
            return self.unusable(str(error))
        trace = printable("".join(traceback.format_exception(error)), MAX_LINE)
        problem = f"raised {error_text(error, _LONGEST_PROBLEM)}"
        return Failed(self._episode, "raised", problem, trace, exhausted=isinstance(error, MemoryError))

    def unusable(self, problem: str) -> Failed:
        """Return the message about what the environment does wrong."""
        return Failed(self._episode, "unusable", printable(problem, _LONGEST_PROBLEM))

    def _scored(self, trajectory: Trajectory) -> str:
        """The text of ``trajectory`` that reward functions get."""
        if trajectory.text is not None:
            return trajectory.text
        sampled = next((one.tokens for one in reversed(trajectory.segments) if one.sampled), [])
        return self._tokenizer.decode(sampled, skip_special_tokens=True)

    def _fit(self, trajectory: Trajectory) -> None:
        """Leave out what the environment has given behind the last sampled token and does not fit: nobody learns from
        it. Raises ContextError where a trajectory is too long even so."""
        while (room := self.room(trajectory)) < 0 and trajectory.segments and not trajectory.segments[-1].sampled:
            trajectory.segments.pop()
        if room < 0:
            raise ContextError(f"a trajectory has {-room} tokens more than fit into the context")

    def _line(self, trajectory: Trajectory) -> tuple[Line, dict[int, list[int]]]:
        """Return the trajectory by the numbers of its segments, and the tokens of those that are new. Raises
        ContextError."""
        given, line = dict[int, list[int]](), list[int]()
        if not 0 <= trajectory.number < len(self._begun):
            raise ContextError("a trajectory does not come from context.begin or context.fork")
        (start, role), last = self._begun[trajectory.number], -1
        for what, own, begun in (("start", trajectory.start, start), ("role", trajectory.role, role)):
            if own != begun:
                raise ContextError(f"a trajectory has another {what} than it began with")
        for place, segment in enumerate(trajectory.segments):
            known = self._known.get(id(segment.tokens))
            if known is None and not segment.sampled:
                self._check(segment.tokens)
                known = self._known[id(segment.tokens)] = segment.tokens, self._next_segment()
                given[known[1]] = segment.tokens
            if known is None or segment.sampled != (known[1] in self._behind):
                claims, was = ("sampled by the policy", "not") if segment.sampled else ("given", "sampled")
                raise ContextError(f"a segment claims to be {claims}, and was {was}")
            line.append(known[1])
            last = place if segment.sampled else last
        if last >= 0:  # what stands before is as it was when this was sampled, and earlier ones were examined then
            behind = self._behind[line[last]]
            if (behind.start, behind.segments) != (start, line[:last]):
                raise ContextError("a trajectory has a sampled segment behind other tokens than it was sampled behind")
            if behind.role != role:
                raise ContextError(
                    f"a trajectory of the role {role!r} has a segment that {behind.role!r} sampled; what others say is "
                    "given: append a copy of the tokens with sampled=False"
                )
        return Line(trajectory.number, start, line, role), given

    def _check(self, tokens: Sequence[int]) -> None:
        """Raise ContextError for tokens that the model does not have, which would be an error of the engine."""
        if wrong := [t for t in tokens if type(t) is not int or not 0 <= t < self._vocab_size]:
            raise ContextError(f"gave the token {wrong[0]!r}; the model has the tokens 0 to {self._vocab_size - 1}")

    def _next_segment(self) -> int:
        self._segments += 1
        return self._segments - 1


def _number(name: Any, value: Any) -> float:
    """Return a number of an environment as a float. Raises ContextError."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (isinstance(name, str) and name.isprintable() and math.isfinite(number)):
        raise ContextError(f"gave {name!r:.80} the value {value!r:.80}; write a printable name and a finite number")
    return number
