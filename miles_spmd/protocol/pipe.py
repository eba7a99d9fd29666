"""What goes through the pipe between the controller and who has started it (rank 0, or the supervisor of cells): the
order of the run, and back the credentials that admit ranks to it; later why the run has to end, and news of cells."""

from __future__ import annotations

from typing import Literal

import msgspec
import zmq

LAUNCHER = "MILES_SPMD_LAUNCHER"  # environment of ranks: the process that launches them, which may die before they look
SUPERVISOR = "MILES_SPMD_SUPERVISOR"  # environment of a cell's ranks: the process with which they end
REQUEUE = 75  # exit status (EX_TEMPFAIL) of a run that was asked to stop: it can be continued
EXIT_SECONDS = 5.0  # which a controller that has to stop may take to close its files


class Replay(msgspec.Struct, frozen=True):
    """The steps from ``first`` to ``step`` of the run in the folder ``run``. In phase "rollout" the last step is
    generated and not trained; in phase "train" nothing is generated: the responses are those that the run recorded."""

    run: str
    first: int
    step: int
    phase: Literal["rollout", "train"] | None

    @property
    def steps(self) -> range:
        return range(self.first, self.step + 1)


class Order(msgspec.Struct, frozen=True):
    """What the controller is to do, and for whom."""

    config: str  # JSON of the resolved configuration
    task: str  # "train", "generate", "serve", "eval", "warm", "replay" or "bisect"
    host: str  # name or address under which all workers reach the controller's machine
    world_size: int
    replay: Replay | None = None  # of the tasks "replay" and "bisect"


class Credentials(msgspec.Struct, frozen=True):
    """Of one rank: every rank has a key pair of its own, and whoever holds it speaks for this rank and no other. Keys
    are Z85 text. They reach the ranks in a file that only the run's user can read (``worker/meeting.py``).
    """

    endpoint: str  # "tcp://host:port"
    server_public: str
    client_public: str
    client_secret: str
    logs: str = ""  # folder of the attempt's logs, which the controller chooses

    def __repr__(self) -> str:
        return f"Credentials({self.endpoint})"  # never a secret in a log


class End(msgspec.Struct, tag=True, frozen=True):
    """To the controller: end the run. ``reason`` is for its last message."""

    reason: str


class CellEnded(msgspec.Struct, tag=True, frozen=True):
    """To the controller: the launcher of this cell has ended. ``how``: in words."""

    cell: int
    start: int  # number of the start that has ended
    how: str


class StartCell(msgspec.Struct, tag=True, frozen=True):
    """To the supervisor: end what is left of this cell, and start it ``after`` so many seconds. ``start``: how often it
    was started before; ``credentials``: of its ranks, none where it is to stay away."""

    cell: int
    start: int
    after: float
    credentials: list[Credentials]


class PrepareCell(msgspec.Struct, tag=True, frozen=True):
    """To the supervisor: the cell takes part in the run, and this start of it will be needed when it is lost."""

    cell: int
    start: int


ToController = End | CellEnded
ToSupervisor = StartCell | PrepareCell


def make_keys() -> tuple[str, str]:
    """Return a new CURVE key pair (public, secret)."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()
