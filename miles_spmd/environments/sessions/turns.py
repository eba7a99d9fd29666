"""The turns of a session: what the policy said, as trees, and where a client's history of messages stands in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import msgspec

from miles_spmd.environments.dialect import Said
from miles_spmd.environments.sessions import history
from miles_spmd.environments.sessions.history import Meaning, Message
from miles_spmd.types.trajectory import Trajectory

_MOST_ALIKE = 64  # turns that say the same and are considered


class Turn(msgspec.Struct, eq=False, frozen=True):
    """What the policy said in one place, which ``path`` names."""

    parent: Turn | None
    path: str
    state: bytes  # of the conversation with it
    trajectory: Trajectory  # that ends with it
    said: Said
    calls: int  # in the conversation so far
    added: list[Message]  # since the parent, and what was said; none in a text
    text: str = ""  # all of it with what was said, where it is a text, and not a conversation

    @property
    def line(self) -> list[Turn]:
        """The turns of the conversation, the first one first."""
        turns, turn = list[Turn](), self
        while turn is not None:
            turns.append(turn)
            turn = turn.parent  # type: ignore[assignment]
        return turns[::-1]

    @property
    def messages(self) -> list[Message]:
        """All of the conversation."""
        return [message for turn in self.line for message in turn.added]

    @property
    def ended(self) -> Trajectory:
        """The trajectory that ends with it."""
        before = self.trajectory
        return Trajectory(
            before.start,
            [*before.segments],
            before.number,
            text=self.said.message.content,
            messages=self.messages,
            finish_reason=before.finish_reason,
        )


class Turns:
    """All of a session. A state is what a conversation says, as a digest: equal for equal meanings."""

    def __init__(self) -> None:
        self._all: list[Turn] = []
        self._said: defaultdict[tuple[bytes, Meaning], list[Turn]] = defaultdict(list)  # by the state before them

    def __len__(self) -> int:
        return len(self._all)

    def add(self, turn: Turn, before: bytes) -> None:
        """Add a turn behind a conversation of state ``before``."""
        self._all.append(turn)
        for meaning in _meanings(turn.said):
            self._said[before, meaning].append(turn)

    @property
    def leaves(self) -> list[Turn]:
        """Those that were not continued, in an order that does not depend on time: the longest conversations first."""
        inner = {id(turn.parent) for turn in self._all}
        found = [turn for turn in self._all if id(turn) not in inner]
        return sorted(found, key=lambda turn: (-len(turn.line), turn.path, turn.trajectory.response))

    def before(self, text: str) -> Turn | None:
        """Return the turn that ends the longest text with which ``text`` begins."""
        found = (turn for turn in self._all if turn.text and text.startswith(turn.text))
        return max(found, key=lambda turn: (len(turn.text), turn.path), default=None)

    def before_tokens(self, tokens: list[int]) -> Turn | None:
        """Return the turn of a text that ends the most tokens with which ``tokens`` begin."""
        texts = ((turn, turn.trajectory.tokens) for turn in self._all if turn.text)
        found = ((len(own), turn.path, turn) for turn, own in texts if tokens[: len(own)] == own)
        return max(found, key=lambda one: one[:2], default=(0, "", None))[2]

    def recognise(
        self, state: bytes, messages: Sequence[Message], trims: Mapping[str, bool]
    ) -> tuple[bytes, Turn | None]:
        """Return the state of a conversation, and the turn that the assistant's last message is; None where there is
        none, or the policy has not said it there. ``state``: of a conversation that has not begun."""
        # several, where turns say the same: what follows them tells them apart
        found: list[tuple[bytes, Turn | None]] = [(state, None)]
        for message in messages:
            if message["role"] != "assistant":
                found = [(history.follow(before, message, trims), turn) for before, turn in found]
                continue
            turns = [turn for before, _ in found for turn in self._alike(before, message)]
            found = [(turn.state, turn) for turn in turns[:_MOST_ALIKE]] or [
                (history.follow(before, message, trims), None) for before, _ in found
            ]
        return found[0]

    def _alike(self, state: bytes, message: Message) -> list[Turn]:
        """Return the turns that say what a message of the assistant says, those with its reasoning first."""
        for meaning in history.meanings(message):
            if turns := self._said.get((state, meaning)):
                reasoning = message.get("reasoning_content", "")
                return sorted(turns, key=lambda turn: (turn.said.message.reasoning != reasoning, turn.path))
        return []


def _meanings(said: Said) -> list[Meaning]:
    """Return what a client may send back as a turn: some write the stop string, which they did not get, behind it."""
    calls = [(call.name, call.text) for call in said.message.calls]
    contents = [said.message.content]
    if said.stopped_by:
        contents += [said.message.content + said.stopped_by]
    return [Meaning.of(content, calls) for content in contents]
