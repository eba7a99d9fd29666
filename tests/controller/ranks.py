"""Ranks that follow the protocol over real sockets and compute nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from miles_spmd.protocol.commands import Command, Stop
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.messages import (
    Call,
    EngineRank,
    Failure,
    Heartbeat,
    Hello,
    Message,
    RankInfo,
    Reply,
    TrainerRank,
)
from miles_spmd.protocol.pipe import Credentials
from miles_spmd.protocol.results import (
    Bisection,
    CheckpointResult,
    LogProbsResult,
    MeetResult,
    Ok,
    PartResult,
    RefitResult,
    Result,
    SaveProgress,
    TrainResult,
    UpdateResult,
    ValuesResult,
    WeightsDigest,
)
from miles_spmd.types.phase import Phase

DIGEST = "0123456789abcdef"
HOST = "node-a"

EMPTY = {  # a result of each type
    Ok: Ok(),
    TrainResult: TrainResult([{}], grad_norm=0.0, lr=0.0),
    PartResult: PartResult([{}]),
    UpdateResult: UpdateResult(grad_norm=0.0, lr=0.0),
    MeetResult: MeetResult(updates=1),
    LogProbsResult: LogProbsResult(),
    ValuesResult: ValuesResult(),
    WeightsDigest: WeightsDigest([], [], np.zeros(0, np.uint64)),
    CheckpointResult: CheckpointResult({}),
    SaveProgress: SaveProgress(done=True),
    RefitResult: RefitResult(0, 0, 0, 0),
    Bisection: Bisection([]),
}


def empty(command: Command) -> Result:
    """A result of the type that the command declares."""
    return EMPTY[command.result_type()]


Response = Callable[["FakeRank", Call], Result | Failure | None]


def info_of(rank: int, world_size: int, engine_size: int = 1) -> RankInfo:
    return RankInfo(
        rank=rank,
        world_size=world_size,
        host=HOST,
        pid=1000 + rank,
        trainer=TrainerRank(rank, world_size, reports=True),
        engine=EngineRank(rank // engine_size, rank % engine_size == 0),
    )


class FakeRank(threading.Thread):
    """Sends a hello, then replies to every call with ``respond`` (None: no reply) until it receives Stop."""

    def __init__(
        self,
        credentials: Credentials,
        rank: int,
        world_size: int,
        respond: Response = lambda rank, call: empty(call.command),
        *,
        engine_size: int = 1,
        digest: str = DIGEST,
        hello: bool = True,
    ) -> None:
        super().__init__(daemon=True)
        self.rank, self.respond, self.hello = rank, respond, hello
        self.leader = rank % engine_size == 0
        self.received: list[Any] = []  # commands
        self.gone = threading.Event()
        self._credentials = credentials
        self._hello = Hello(info_of(rank, world_size, engine_size), digest, {"imports": 1.5})
        self.start()

    def send(self, message: Message) -> None:
        """From ``respond`` only: a socket belongs to one thread."""
        self.dealer.send(message)

    def run(self) -> None:
        self.dealer = Dealer(self._credentials)
        self.send(self._hello if self.hello else Heartbeat(self.rank, Phase.START, 0, "import (worker.py:1)"))
        while not self.gone.is_set():
            call = self.dealer.receive(0.02)
            if not isinstance(call, Call):
                continue
            self.received.append(call.command)
            result = self.respond(self, call)
            if result is not None:
                self.send(Reply(call.id, self.rank, HOST, result, {"work": 0.25 * (self.rank + 1)}))
            if isinstance(call.command, Stop):
                break
        self.dealer.close()

    def leave(self) -> None:
        self.gone.set()
        self.join()
