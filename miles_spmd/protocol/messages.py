"""Every message between controller and workers, and its bytes: msgpack, decoded into declared types only, never pickle.

The controller sends a :class:`Call`, which carries a command; a worker replies with exactly one :class:`Reply`, unless
the command is part of a rollout and has no reply of its own. :class:`Hello` reports that a worker is built,
:class:`Heartbeat` that its process is alive, :class:`Overdue` where it stands when time is up; a worker that fails to
start reports that as a Reply to call 0.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from miles_spmd.protocol.commands import AnyCommand, AnyResult
from miles_spmd.types.engine_group import POLICY
from miles_spmd.types.gpu_health import GpuHealth
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
    waits_with: int | None = None  # ranks with one number wait for each other in forward and backward passes

    @property
    def unit(self) -> int:
        """The number of the ranks that wait for each other; of one model replica where nothing else is known."""
        return self.data_parallel_rank if self.waits_with is None else self.waits_with


class EngineRank(msgspec.Struct, frozen=True):
    """The position of a rank among the engines."""

    engine: int
    leader: bool
    cache_tokens: int | None = None  # whose keys and values the engine can hold; None: nothing stays between requests
    longest_request: int | None = None  # tokens of prompt and response together; None: what the model's context holds


class RankInfo(msgspec.Struct, frozen=True):
    """The place and the duties of a rank; all that the controller's plans depend on."""

    rank: int
    world_size: int
    host: str
    pid: int
    trainer: TrainerRank | None  # None: does not train
    engine: EngineRank | None  # None: does not generate
    versions: dict[str, str] = {}
    device: str = ""  # of its host, as people know it; "" on a CPU
    group: str = POLICY  # the engine group that it holds a part of, or trains


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


class Collective(msgspec.Struct, frozen=True):
    """A collective that a rank has entered."""

    number: int  # in its group; the same on all ranks, which enter the collectives of a group in one order
    operation: str
    tensors: str  # types and sizes of what this rank contributes
    seconds: float  # since it was entered
    done: bool


class GroupRecord(msgspec.Struct, frozen=True):
    """The newest collectives of one group, oldest first, as one of its ranks has recorded them."""

    name: str
    purpose: str  # in the words of whoever made the group; may be ""
    ranks: list[int]
    collectives: list[Collective]
    messages: list[Collective] = []  # unfinished ones from or to one other rank


class Overdue(msgspec.Struct, tag=True, frozen=True):
    """Sent by a worker's side thread when a deadline is missed: where the rank stands."""

    rank: int
    frames: list[str]  # of the main thread, innermost first
    groups: list[GroupRecord]
    engine_step: float = 0.0  # the limit in seconds, where it is that of one step of the engine; 0: of the command


class Completions(msgspec.Struct, tag=True, frozen=True):
    """Finished requests of an open rollout, sent by an engine's leader as they finish."""

    rank: int
    outputs: list[Output]


class Failure(msgspec.Struct, tag=True, frozen=True):
    """An exception on a worker: its type, its text, and the traceback for the log."""

    kind: str
    message: str
    traceback: str = ""
    engine: bool = False  # it came from the engine's own work, which a new engine may do


class OwnWork(msgspec.Struct, frozen=True):
    """What a rank did in a command before it waited for others than those that it always waits with."""

    seconds: float
    amount: float  # tokens of the trainer, steps of an engine


class Reply(msgspec.Struct, tag=True, frozen=True):
    """What came of one call on one rank."""

    id: int  # of the call
    rank: int
    host: str
    result: AnyResult | Failure
    seconds: dict[str, float] = {}  # by part
    memory: dict[str, float] = {}  # this rank's values of the metrics ``memory/...``
    own: OwnWork | None = None
    gpus: list[GpuHealth] = []  # of the host, once a step from its first rank


Message = Call | Hello | Heartbeat | StopNotice | HoldPasses | Held | ReleasePasses | Overdue | Completions | Reply

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
