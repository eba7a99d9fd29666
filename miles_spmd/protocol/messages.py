"""Every message between controller and workers.

The controller sends a :class:`Call`, which carries a command; a worker replies with exactly one :class:`Reply`, unless
the command is part of a rollout and has no reply of its own. :class:`Hello` reports that a worker is built,
:class:`Heartbeat` that its process is alive; a worker that fails to start reports that as a Reply to call 0.
"""

from __future__ import annotations

import msgspec

from miles_spmd.protocol.commands import AnyCommand, AnyResult
from miles_spmd.types.phase import Phase
from miles_spmd.types.request import Output


class Call(msgspec.Struct, tag=True, frozen=True):
    """One command for one rank."""

    id: int
    step: int
    deadline: float  # seconds from receipt within which the reply is due
    command: AnyCommand


class TrainerRank(msgspec.Struct, frozen=True):
    """The position of a rank in the trainer."""

    data_parallel_rank: int
    data_parallel_size: int
    reports: bool  # its results are used (last pipeline stage, first tensor-parallel rank)


class EngineRank(msgspec.Struct, frozen=True):
    """The position of a rank among the engines."""

    engine: int
    leader: bool


class RankInfo(msgspec.Struct, frozen=True):
    """The place and the duties of a rank; all that the controller's plans depend on."""

    rank: int
    world_size: int
    host: str
    pid: int
    trainer: TrainerRank | None  # None: does not train
    engine: EngineRank | None  # None: does not generate
    versions: dict[str, str] = {}


class Hello(msgspec.Struct, tag=True, frozen=True):
    """The first message of a worker whose models and engine are built."""

    info: RankInfo
    config_digest: str
    seconds: dict[str, float] = {}  # of the start, by part
    memory: dict[str, float] = {}  # as in Reply


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """Sent by a worker's side thread, over a connection of its own. Phase STOP announces the end of the process."""

    rank: int
    phase: Phase
    step: int
    detail: str = ""  # progress and code position: "engine step 214", "micro-batch 3/8"


class Completions(msgspec.Struct, tag=True, frozen=True):
    """Finished requests of an open rollout, sent by an engine's leader as they finish."""

    rank: int
    outputs: list[Output]


class Failure(msgspec.Struct, tag=True, frozen=True):
    """An exception on a worker: its type, its text, and the traceback for the log."""

    kind: str
    message: str
    traceback: str = ""


class Reply(msgspec.Struct, tag=True, frozen=True):
    """What came of one call on one rank."""

    id: int  # of the call
    rank: int
    host: str
    result: AnyResult | Failure
    seconds: dict[str, float] = {}  # by part
    memory: dict[str, float] = {}  # this rank's values of the metrics ``memory/...``


Message = Call | Hello | Heartbeat | Completions | Reply
