"""A session: conversations of the policy with code that is not ours, which holds an address and a key of it.

The client sends the whole conversation each time. A conversation whose last message of the assistant is known is
continued by what follows that message, and keeps the tokens that were sampled; any other begins with the tokens of its
text. So the turns form trees, and each leaf is a trajectory.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from miles_spmd.environments.calls import Message as AssistantMessage
from miles_spmd.environments.context import ContextError
from miles_spmd.environments.continuation import ContinuationError
from miles_spmd.environments.dialect import AUTO, Dialect, Said, TooLongError, Written, end, refuse_too_long
from miles_spmd.environments.sessions import history
from miles_spmd.environments.sessions.chat import ChatRequest
from miles_spmd.environments.sessions.completions import CompletionRequest
from miles_spmd.environments.sessions.history import Message
from miles_spmd.environments.sessions.protocol import CONTEXT_FULL, ENDED, Choice, RequestError, Response
from miles_spmd.environments.sessions.turns import Turn, Turns
from miles_spmd.environments.tool_schemas import Schema
from miles_spmd.plugins.environment import Completion, Context
from miles_spmd.types.trajectory import FinishReason, Segment, Trajectory

MAX_TURNS = 2048  # of a session
MAX_UNDER_WAY = 256  # turns of a session that are sampled at the same time
_ROLES = ("system", "user", "tool")


Asked = ChatRequest | CompletionRequest


class _Writer(NamedTuple):
    """How conversations with one set of tools are written."""

    dialect: Dialect
    trims: dict[str, bool]  # by roles, whether the white space around contents is left out


class _Place(NamedTuple):
    """Where the policy is to say something."""

    parent: Turn | None
    state: bytes  # of the conversation so far
    dialect: Dialect | None  # None: it is a text, and not a conversation
    trajectory: Trajectory
    written: Written  # since the parent
    added: list[Message]

    @property
    def text(self) -> str:
        """All of it, where it is a text."""
        return (self.parent.text if self.parent is not None else "") + self.written.text


class Session:
    """Serves the requests of one client, which may send several at the same time. ``base_url`` and ``api_key`` are set
    by the endpoint that it is open at."""

    def __init__(
        self, context: Context, number: int = 0, *, call_format: str = AUTO, reasoning_format: str = AUTO
    ) -> None:
        """``number``: among the sessions of the episode."""
        self.base_url = self.api_key = ""
        self.failure: BaseException | None = None  # of the server, by which the episode fails
        self._context, self._number = context, number
        self._formats = {"call_format": call_format, "reasoning_format": reasoning_format}
        self._writers: dict[bytes, _Writer] = {}  # by the states of conversations that have not begun
        self._turns = Turns()
        self._continued: set[bytes] = set()  # states of turns
        self._first: dict[str, Turn] = {}  # that a request has had, by the keys of requests
        self._begun = 0  # conversations
        self._responses: dict[str, asyncio.Task[Response]] = {}  # by the keys of their requests
        self._under_way = 0
        self._variables = contextvars.copy_context()  # by which a task belongs to the episode

    @property
    def trajectories(self) -> list[Trajectory]:
        """Those that the conversations have become: one for each turn that was not continued, the longest first."""
        return [turn.ended for turn in self._turns.leaves]

    async def respond(self, request: Asked) -> Response:
        """Return what the policy says; for a request that the client repeats, what it has said. Raises RequestError."""
        task = self._responses.get(request.key)
        if task is None:
            self._admit(request)
            self._under_way += request.choices
            task = self._variables.run(asyncio.ensure_future, self._respond(request))
            task.add_done_callback(lambda done: self._finish(request, done))
            self._responses[request.key] = task
        else:
            self._context.count("session_repeats")
        try:
            return await asyncio.shield(task)  # a client that has gone may come back for it
        except asyncio.CancelledError:
            if task.cancelled():
                raise RequestError(404, "the session has ended", ENDED) from None
            raise

    def conversation(self, key: str) -> list[Message] | None:
        """Return the messages up to the response to a request, its own one included; None for the key of a request
        without a response."""
        turn = self._first.get(key)
        return None if turn is None else turn.messages

    async def close(self) -> None:
        """Cancel what is under way: nobody waits for it any more."""
        tasks = [task for task in self._responses.values() if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _admit(self, request: Asked) -> None:
        """Raises RequestError."""
        if self._under_way + request.choices > MAX_UNDER_WAY:
            raise RequestError(429, f"a session samples up to {MAX_UNDER_WAY} turns at a time", "rate_limit_exceeded")
        if len(self._turns) + request.choices > MAX_TURNS:
            raise RequestError(403, f"a session has up to {MAX_TURNS} turns", "session_full")

    def _finish(self, request: Asked, task: asyncio.Task[Response]) -> None:
        self._under_way -= request.choices
        if task.cancelled() or (error := task.exception()) is None:
            return
        del self._responses[request.key]
        if not isinstance(error, RequestError):
            self.failure = error

    # --- one request -------------------------------------------------------------------------------------------------

    async def _respond(self, request: Asked) -> Response:
        place = self._find(request) if isinstance(request, ChatRequest) else self._find_text(request)
        for name in request.without_effect:
            self._context.count(f"session_ignored/{name}")
        self._count_branches("choices", request.choices - 1)
        sampled = (self._sample(request, place, choice) for choice in range(request.choices))
        choices = [self._add(request, place, *one) for one in await asyncio.gather(*sampled)]
        return Response(request.key, place.trajectory.tokens, choices)

    async def _sample(self, request: Asked, place: _Place, choice: int) -> tuple[Trajectory, Completion, str]:
        """Let the policy say something, and return it with the path of its turn. Raises RequestError."""
        path = self._path(place, request.seed, choice)
        trajectory = Trajectory(place.trajectory.start, [*place.trajectory.segments], place.trajectory.number)
        completion = await self._context.complete(
            trajectory, max_new_tokens=request.limit, stop=request.stops, path=path, log_probs=request.asks_log_probs
        )
        if not completion.tokens:
            raise _context_full()
        return trajectory, completion, path

    def _path(self, place: _Place, seed: int | None, choice: int) -> str:
        """Name a turn by what the policy has seen before it, and by what tells apart requests that are the same
        otherwise: whenever it is sampled, it gets the same seed."""
        before = place.parent.path if place.parent is not None else f"session {self._number}"
        named = msgspec.json.encode((before, place.written.tokens, seed, choice))
        return hashlib.blake2b(named, digest_size=16).hexdigest()

    def _add(
        self,
        request: Asked,
        place: _Place,
        trajectory: Trajectory,
        completion: Completion,
        path: str,
    ) -> Choice:
        """Add a turn to those of the session, and return what the client gets of it."""
        calls = place.parent.calls if place.parent is not None else _count_calls(place.added)
        said = self._read(request, place, completion, calls)
        message = said.message.to_chat()
        turn = Turn(
            parent=place.parent,
            path=path,
            state=msgspec.json.encode((path, len(self._turns))),
            trajectory=trajectory,
            said=said,
            calls=calls + len(said.message.calls),
            added=[*place.added, message] if place.dialect is not None else [],
            text=place.text + self._context.decode(completion.tokens) if place.dialect is None else "",
        )
        self._turns.add(turn, place.state)
        self._first.setdefault(request.key, turn)
        reason = "length" if completion.finish_reason is FinishReason.LENGTH else "stop"
        if said.message.calls:
            message = message | {"content": said.message.content or None}
            reason = "tool_calls" if reason == "stop" else reason
        texts = [self._context.decode([token]) for token in completion.tokens] if request.asks_log_probs else []
        return Choice(message, reason, completion.tokens, completion.log_probs, texts, completion.weight_versions)

    def _read(self, request: Asked, place: _Place, completion: Completion, calls: int) -> Said:
        if place.dialect is None or isinstance(request, CompletionRequest):
            text, ended_by, stopped_by = end(self._context, completion, request.stops)
            return Said(AssistantMessage(text), ended_by, stopped_by)
        return place.dialect.read(
            completion, place.written.text, calls, stop=request.stops, reads_calls=request.tool_choice != "none"
        )

    # --- the place of a request --------------------------------------------------------------------------------------

    def _find(self, request: ChatRequest) -> _Place:
        """Return where a request lets the policy continue a conversation. Raises RequestError."""
        messages, tools = history.plain(request.messages), request.tools or []
        state = history.begin(tools)
        knows_tools = state in self._writers
        dialect, trims = self._writer(state, tools)
        state, parent = self._turns.recognise(state, messages, trims)
        first = 1 + max((number for number, one in enumerate(messages) if one["role"] == "assistant"), default=-1)
        reason = ("history" if knows_tools else "tools") if first else "conversation"
        if parent is not None:
            added = messages[first:]
            self._refuse_too_long("".join(one["content"] for one in added))
            try:
                return self._continue(parent, state, dialect, dialect.continued(parent.said, added), added)
            except ContinuationError:
                reason = "template"
        try:
            written = dialect.begun(messages)
        except TooLongError:
            raise _context_full() from None
        except ValueError as error:
            raise RequestError(400, str(error), param="messages") from error
        return self._begin(state, dialect, written, messages, reason)

    def _find_text(self, request: CompletionRequest) -> _Place:
        """Return where a request lets the policy continue a text: behind the longest one that the prompt begins with.
        What spells a special token becomes one: whoever sends a text has written it as a template would."""
        prompt, state = request.text, history.begin([request.key])
        if request.tokens:
            return self._find_tokens(request.tokens, state)
        if (parent := self._turns.before(prompt)) is None:
            self._refuse_too_long(prompt)
            tokens = self._context.encode(prompt, at_start=True, templated=False)
            return self._begin(state, None, Written(prompt, tokens), [], "conversation")
        rest = prompt.removeprefix(parent.text)
        self._refuse_too_long(rest)
        return self._continue(parent, state, None, Written(rest, self._context.encode(rest)), [])

    def _find_tokens(self, tokens: list[int], state: bytes) -> _Place:
        """Return where tokens let the policy continue: behind the most that it has seen and sampled of them. Raises
        RequestError for tokens that it does not have, or too many."""
        if self._context.room(Trajectory(tokens)) < 1:
            raise _context_full()
        try:
            self._context.begin(tokens)  # what the policy continues may not be this
        except ContextError as error:
            raise RequestError(400, f"prompt: {error}", param="prompt") from None
        parent = self._turns.before_tokens(tokens)
        rest = tokens if parent is None else tokens[len(parent.trajectory.tokens) :]
        written = Written(self._context.decode(rest), rest)
        if parent is None:
            return self._begin(state, None, written, [], "conversation")
        return self._continue(parent, state, None, written, [])

    def _continue(
        self, turn: Turn, state: bytes, dialect: Dialect | None, written: Written, added: list[Message]
    ) -> _Place:
        """Return the place behind a turn; another one than the first is counted."""
        if turn.state in self._continued:
            self._count_branches("fork")
        self._continued.add(turn.state)
        before, given = turn.trajectory, [Segment(written.tokens, sampled=False)] if written.tokens else []
        trajectory = Trajectory(before.start, [*before.segments, *given], before.number)
        return _Place(turn, state, dialect, trajectory, written, added)

    def _begin(
        self, state: bytes, dialect: Dialect | None, written: Written, added: list[Message], reason: str
    ) -> _Place:
        """Return the place behind a new start; another one than the first is counted by its ``reason``."""
        trajectory = self._context.begin(written.tokens)
        if self._begun:
            self._count_branches(reason)
        self._begun += 1
        return _Place(None, state, dialect, trajectory, written, added)

    def _refuse_too_long(self, text: str) -> None:
        """Raises RequestError."""
        try:
            refuse_too_long(self._context, text)
        except TooLongError:
            raise _context_full() from None

    def _writer(self, state: bytes, tools: Sequence[Schema]) -> _Writer:
        """Raises RequestError."""
        if state not in self._writers:
            try:
                dialect = Dialect(self._context, tools, **self._formats)
            except ValueError as error:
                raise RequestError(400, str(error), param="tools") from error
            self._writers[state] = _Writer(dialect, {role: dialect.trims(role) for role in _ROLES})
        return self._writers[state]

    def _count_branches(self, reason: str, count: int = 1) -> None:
        if count:
            self._context.count(f"session_branches/{reason}", count)


def _context_full() -> RequestError:
    return RequestError(400, "the conversation fills the context, or the limit of a trajectory", CONTEXT_FULL)


def _count_calls(messages: Sequence[Message]) -> int:
    return sum(len(message.get("tool_calls", ())) for message in messages)
