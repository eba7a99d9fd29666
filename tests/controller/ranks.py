"""Ranks that speak the protocol over real sockets and do nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from miles_spmd.protocol.credentials import Credentials
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.messages import (
    Command,
    EngineRank,
    Heartbeat,
    Hello,
    Message,
    Ok,
    RankInfo,
    Reply,
    Result,
    Stop,
    TrainerRank,
)
from miles_spmd.types.phase import Phase

DIGEST = "0123456789abcdef"
HOST = "node-a"

Answer = Callable[["SpokenRank", Command], Result | None]


def info_of(rank: int, world_size: int, engine_size: int = 1) -> RankInfo:
    return RankInfo(
        rank=rank,
        world_size=world_size,
        host=HOST,
        pid=1000 + rank,
        trainer=TrainerRank(rank, world_size, reports=True),
        engine=EngineRank(rank // engine_size, rank % engine_size == 0),
    )


class SpokenRank(threading.Thread):
    """Says hello, then answers every command with ``answer`` (None: not at all) until told to stop."""

    def __init__(
        self,
        credentials: Credentials,
        rank: int,
        world_size: int,
        answer: Answer = lambda rank, command: Ok(),
        *,
        engine_size: int = 1,
        digest: str = DIGEST,
        hello: bool = True,
    ) -> None:
        super().__init__(daemon=True)
        self.rank, self.answer, self.hello = rank, answer, hello
        self.leader = rank % engine_size == 0
        self.received: list[Any] = []  # bodies
        self.gone = threading.Event()
        self._credentials = credentials
        self._hello = Hello(info_of(rank, world_size, engine_size), digest, {"imports": 1.5})
        self.start()

    def say(self, message: Message) -> None:
        """From ``answer`` only: a socket belongs to one thread."""
        self.dealer.send(message)

    def run(self) -> None:
        self.dealer = Dealer(self._credentials)
        self.say(self._hello if self.hello else Heartbeat(self.rank, Phase.START, 0, "import (worker.py:1)"))
        while not self.gone.is_set():
            command = self.dealer.receive(0.02)
            if not isinstance(command, Command):
                continue
            self.received.append(command.body)
            result = self.answer(self, command)
            if result is not None:
                seconds = {"work": 0.25 * (self.rank + 1)}
                self.say(Reply(command.id, self.rank, HOST, command.phase, result, seconds))
            if isinstance(command.body, Stop):
                break
        self.dealer.close()

    def leave(self) -> None:
        self.gone.set()
        self.join()
