"""Every message between controller and workers, and its bytes: msgpack, decoded into declared types only, never pickle.

The controller sends a :class:`Call`, which carries a command; a worker replies with exactly one :class:`Reply`, unless
the command is part of a rollout and has no reply of its own. :class:`Hello` reports that a worker is built,
:class:`Heartbeat` that its process is alive; a worker that fails to start reports that as a Reply to call 0.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

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


class StopNotice(msgspec.Struct, tag=True, frozen=True):
    """Sent by a worker's side thread that was signalled to stop: the controller decides what comes of it."""

    rank: int
    signal: str  # its name


class HoldPasses(msgspec.Struct, tag=True, frozen=True):
    """Sent to the side thread of every rank that trains: begin no further forward pass, and reply with a Held."""


class Held(msgspec.Struct, tag=True, frozen=True):
    """How many forward passes of its command a rank has begun, and how many there are (None: it has not begun)."""

    rank: int
    begun: int
    total: int | None


class ReleasePasses(msgspec.Struct, tag=True, frozen=True):
    """Sent after all ranks have replied: go on, and leave the command before pass number ``limit``, if it is given."""

    limit: int | None = None


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


Message = Call | Hello | Heartbeat | StopNotice | HoldPasses | Held | ReleasePasses | Completions | Reply

# --- as bytes ---------------------------------------------------------------------------------------------------------

NUMBERS = "biuf"  # kinds of numpy dtypes that may be sent: bool, integers, floats


class WireError(ValueError):
    """Bytes that do not decode to a message, or a value that cannot be encoded; the text has the reason."""


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in NUMBERS:
        return (value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes())
    what = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise WireError(f"{what} cannot be sent over the wire")


def _decode_array(kind: type, value: Any) -> Any:
    """An array is a view of the received bytes: read-only, and not copied."""
    if kind is np.ndarray:
        dtype, shape, data = value
        if np.dtype(dtype).kind not in NUMBERS:
            # object arrays would be pointers chosen by the sender, and raw records could contain them
            raise ValueError(f"array of dtype {dtype} is not allowed on the wire")
        return np.frombuffer(data, np.dtype(dtype)).reshape(shape)
    raise TypeError(f"{kind} has no wire format")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_decoder = msgspec.msgpack.Decoder(Message, dec_hook=_decode_array)


def encode(message: Message) -> bytes:
    """Raises WireError when the message holds a value without a wire format."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> Message:
    """Raises WireError on everything that is not one of our messages."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        raise WireError(f"not a message of this protocol: {error}") from error
