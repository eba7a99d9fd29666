"""A task for self-play: a game of two players, who take stones from a heap in turn; who takes the last one has won.

    11 stones, take up to 3
    10
    7 stones, take up to 3      (after the other player has taken 3)
    4

The first and the second player are roles of one policy. Each sees its own turns only: how many stones there are and how
many it may take. It says how many it leaves; who says anything else than a number that may be left has lost.

*Optimal play.* Leave a multiple of (limit + 1) stones. Where the game starts with such a multiple the second player can
win, else the first; so the two roles expect different rewards, and how different depends on the limit, which is what
the column ``game`` names.

*Warm-up.* The games that supervised learning imitates are between players who take a random number. Reinforcement
learning has no other opponent than the policy itself.

*Evaluation.* The opponents are a random player and an optimal one, whom the policy meets in evaluations only, and in
starts that it can win.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from miles_spmd.environments.chat import Chat
from miles_spmd.plugins.environment import Context
from miles_spmd.quickstart.language import Language
from miles_spmd.types.sample import Prompt
from miles_spmd.types.trajectory import Trajectory

LIMITS = (2, 3)
STARTS = range(3, 13)
ROLES = ("first", "second")
SFT_GAMES, TRAIN_ROWS, HELDOUT_ROWS = 4096, 2048, 200
MOVE_TOKENS = 3  # one more than a number and the end of the message: what ends at a limit is not a move

LANGUAGE = Language((*map(str, range(STARTS.stop)), " stones, take up to "))


class Position(NamedTuple):
    """What the player sees whose turn it is."""

    stones: int
    limit: int

    @property
    def text(self) -> str:
        return f"{self.stones} stones, take up to {self.limit}"

    @property
    def moves(self) -> range:
        """The numbers of stones that may be left."""
        return range(max(0, self.stones - self.limit), self.stones)

    @property
    def is_lost(self) -> bool:
        """Whether the player loses against an optimal one."""
        return self.stones % (self.limit + 1) == 0


class Policy:
    """The policy in one of the roles. Its conversation begins with its first turn."""

    def __init__(self, context: Context, prompt: Prompt, role: str) -> None:
        self._context, self._prompt, self._role = context, prompt, role
        self._chat: Chat | None = None

    async def move(self, position: Position) -> int | None:
        """Return how many stones it leaves, None where it says something else."""
        message = {"role": "user", "content": position.text}
        if self._chat is None:
            metadata = self._prompt.metadata | {"messages": [message]}
            own = msgspec.structs.replace(self._prompt, text="", tokens=[], metadata=metadata)
            self._chat = Chat(self._context, own, tools=(), role=self._role)
        elif not self._chat.add([message]):
            raise ValueError("rollout.rollout_max_response_len has no room for all turns of a game; raise it")
        reply = await self._chat.respond(max_new_tokens=MOVE_TOKENS)
        return next((move for move in position.moves if str(move) == reply.content), None)

    def trajectories(self, reward: float) -> list[Trajectory]:
        """Return what it has said; nothing where the game was over before its first turn."""
        if self._chat is None:
            return []
        self._chat.trajectory.reward = reward
        return [self._chat.trajectory]


class FixedPlayer:
    """An opponent that is not trained. ``generator`` chooses where it does not matter what it takes."""

    def __init__(self, optimal: bool, generator: random.Random) -> None:
        self._optimal, self._generator = optimal, generator

    async def move(self, position: Position) -> int:
        if self._optimal and not position.is_lost:
            return position.stones - position.stones % (position.limit + 1)
        return self._generator.choice(position.moves)

    def trajectories(self, reward: float) -> list[Trajectory]:
        return []


async def play(context: Context, prompt: Prompt) -> list[Trajectory]:
    """One game: of the policy with itself, or where the row has an ``opponent`` with that one, in the role ``plays``.

    With itself the rewards are 1 and -1. Against an opponent the policy's is 1 or 0, whose mean is the share of games
    that it wins."""
    row = prompt.metadata
    players: list[Policy | FixedPlayer] = [Policy(context, prompt, role) for role in ROLES]
    if (opponent := row.get("opponent")) is not None:
        generator = random.Random(f"{prompt.uid} {context.index}")
        players[1 - ROLES.index(row["plays"])] = FixedPlayer(opponent == "optimal", generator)
    position, turn = Position(row["stones"], row["limit"]), 0
    while True:
        move = await players[turn % 2].move(position)
        if move is None:
            context.count("illegal_moves")
            winner = 1 - turn % 2
            break
        position = position._replace(stones=move)
        if not position.stones:
            winner = turn % 2
            break
        turn += 1
    loss = -1.0 if opponent is None else 0.0
    return [
        one for place, player in enumerate(players) for one in player.trajectories(1.0 if place == winner else loss)
    ]


def data_files() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each file by its name: conversations of random players in ``sft``, else starts."""
    generator = random.Random("stones")
    starts = [Position(stones, limit) for limit in LIMITS for stones in STARTS]
    return {
        "sft.jsonl": [
            {"prompt": talk} for _ in range(SFT_GAMES) for talk in _random_game(generator.choice(starts), generator)
        ],
        "train.jsonl": [_row(generator.choice(starts)) for _ in range(TRAIN_ROWS)],
        "random.jsonl": list(_heldout("random", starts)),
        "optimal.jsonl": list(_heldout("optimal", starts)),
    }


def _row(start: Position, **more: str) -> dict[str, Any]:
    return {"prompt": start.text, "game": f"limit {start.limit}", "stones": start.stones, "limit": start.limit, **more}


def _heldout(opponent: str, starts: list[Position]) -> Iterator[dict[str, Any]]:
    """Yield starts in which the policy can win whatever the opponent does, half of them in each role."""
    for role in ROLES:
        winnable = [start for start in starts if start.is_lost is (role == "second")]
        for number in range(HELDOUT_ROWS // len(ROLES)):
            yield _row(winnable[number % len(winnable)], opponent=opponent, plays=role)


def _random_game(position: Position, generator: random.Random) -> list[list[dict[str, str]]]:
    """Return a game of random players, as the conversation of each that has had a turn."""
    talks: list[list[dict[str, str]]] = [[], []]
    while position.stones:
        move = generator.choice(position.moves)
        talks[0] += [{"role": "user", "content": position.text}, {"role": "assistant", "content": str(move)}]
        position, talks = position._replace(stones=move), talks[::-1]
    return [talk for talk in talks if talk]
