"""Every message between controller and workers, and how it becomes bytes: msgpack by msgspec, typed, never pickle.

The controller sends a :class:`Command`; a worker answers it with exactly one :class:`Reply`. A rollout is one command
with a conversation inside: what feeds it (:data:`Feed`) has no reply of its own, and :class:`Completions` stream back
until the reply to :class:`Generate` closes it. :class:`Hello` says that a worker is built and :class:`Beat` that it is
alive; a worker that fails to start says so in a Reply to command 0.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from miles_spmd.ledger.rectangles import Rectangle
from miles_spmd.types.phase import Phase
from miles_spmd.types.request import Output, Request
from miles_spmd.types.role import Role
from miles_spmd.types.train_sequence import MicroBatch

# --- what a command may ask for --------------------------------------------------------------------------------------


class Generate(msgspec.Struct, tag=True, frozen=True):
    """Open a rollout: step the engine until :class:`EndGenerate` came and nothing is left to run, then reply."""


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Requests for an open rollout. To an engine's leader."""

    requests: list[Request]


class AbortRequests(msgspec.Struct, tag=True, frozen=True):
    """Stop these requests of an open rollout; what they have so far comes back as ABORT. To an engine's leader."""

    rids: list[str]


class EndGenerate(msgspec.Struct, tag=True, frozen=True):
    """Nothing more will be submitted. To an engine's leader."""


class ComputeLogProbs(msgspec.Struct, tag=True, frozen=True):
    """Forward only. Replies with :class:`LogProbsResult`."""

    micro_batches: list[MicroBatch]
    role: Role = Role.ACTOR
    top_k: int = 0  # name so many most likely tokens at each place


class ComputeValues(msgspec.Struct, tag=True, frozen=True):
    """Forward only, of the critic or a reward model. Replies with :class:`ValuesResult`."""

    micro_batches: list[MicroBatch]
    role: Role = Role.CRITIC


class TrainStep(msgspec.Struct, tag=True, frozen=True):
    """One optimizer step on this rank's share of the global batch. Replies with :class:`TrainResult`."""

    micro_batches: list[MicroBatch]
    role: Role = Role.ACTOR


class SnapshotWeights(msgspec.Struct, tag=True, frozen=True):
    """Make the actor's weights of now the reference's or the old actor's."""

    role: Role


class RefitEngine(msgspec.Struct, tag=True, frozen=True):
    """Copy the trainer's weights into the engine as ``version``. Replies with :class:`RefitResult`."""

    version: int


class Bisect(msgspec.Struct, tag=True, frozen=True):
    """Have the engine answer ``request`` again and the trainer read it, and look for the first operator whose outputs
    for the first ``tokens`` tokens differ. Replies with :class:`Bisection`."""

    request: Request
    tokens: int


class DigestWeights(msgspec.Struct, tag=True, frozen=True):
    """Replies with :class:`WeightsDigest`."""

    role: Role = Role.ACTOR


class SaveCheckpoint(msgspec.Struct, tag=True, frozen=True):
    """Replies with :class:`CheckpointResult`."""

    path: str


class LoadCheckpoint(msgspec.Struct, tag=True, frozen=True):
    """Replies with :class:`CheckpointResult`."""

    path: str


class ExportModel(msgspec.Struct, tag=True, frozen=True):
    """Write the trainer's weights as a Hugging Face checkpoint."""

    path: str


Feed = Submit | AbortRequests | EndGenerate  # part of a rollout: no reply of their own


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Leave the command loop and exit 0."""


Body = (
    Generate
    | Submit
    | AbortRequests
    | EndGenerate
    | ComputeLogProbs
    | ComputeValues
    | TrainStep
    | SnapshotWeights
    | RefitEngine
    | Bisect
    | DigestWeights
    | SaveCheckpoint
    | LoadCheckpoint
    | ExportModel
    | Stop
)


class Command(msgspec.Struct, tag=True, frozen=True):
    id: int
    step: int
    phase: Phase
    deadline: float  # seconds from receipt within which the reply is due
    body: Body


# --- what a worker says ----------------------------------------------------------------------------------------------


class TrainerRank(msgspec.Struct, frozen=True):
    """Where a rank stands in the trainer."""

    data_parallel_rank: int
    data_parallel_size: int
    reports: bool  # its results count (last pipeline stage, first tensor-parallel rank)


class EngineRank(msgspec.Struct, frozen=True):
    """Where a rank stands among the engines."""

    engine: int
    leader: bool


class RankInfo(msgspec.Struct, frozen=True):
    """What a rank does in the run, and where; the controller plans with nothing else."""

    rank: int
    world_size: int
    host: str
    pid: int
    trainer: TrainerRank | None  # None: does not train
    engine: EngineRank | None  # None: does not generate
    versions: dict[str, str] = {}


class Hello(msgspec.Struct, tag=True, frozen=True):
    info: RankInfo
    config_digest: str
    seconds: dict[str, float] = {}  # start-up, by part
    memory: dict[str, float] = {}  # as in Reply


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """From a worker's side thread, over a connection of its own. Phase STOP: a signal told this process to leave."""

    rank: int
    phase: Phase
    step: int
    detail: str = ""  # what exactly: "engine step 214", "micro-batch 3/8"


class Completions(msgspec.Struct, tag=True, frozen=True):
    """Finished requests of an open rollout, from an engine's leader, as they finish."""

    rank: int
    outputs: list[Output]


class UpdateDigests(msgspec.Struct, frozen=True):
    """One number, uint64, for each rectangle that :class:`WeightsDigest` has named."""

    gradient: np.ndarray  # over ``of_updates``: summed over all ranks, before it is clipped
    weights: np.ndarray  # over ``of_weights``: after the update


class TrainResult(msgspec.Struct, tag=True, frozen=True):
    """What one optimizer step did. ``sums`` are this rank's plain sums, one for each leaf of the canonical reduction
    that it has (without: one), to be added over ``reports`` ranks; under context parallelism each of its ranks reports
    its own tokens."""

    sums: list[dict[str, float]]
    grad_norm: float
    lr: float
    skipped: str = ""  # why no update was made: "non-finite loss", "non-finite gradient"
    log_probs: list[np.ndarray] | None = None  # float32 [T] per sequence in batch order, before the update
    digests: UpdateDigests | None = None  # where a ledger is kept


class LogProbsResult(msgspec.Struct, tag=True, frozen=True):
    """Of the micro-batches' sequences in order; entry 0 of each is 0. None on ranks that do not report, and what was
    not asked for."""

    log_probs: list[np.ndarray] | None = None  # float32 [T]
    candidates: list[np.ndarray] | None = None  # int32 [T, top_k], the most likely tokens
    candidate_log_probs: list[np.ndarray] | None = None  # float32 [T, top_k]
    given_log_probs: list[np.ndarray] | None = None  # float32 [T, K], of the sequences' own ``candidates``


class ValuesResult(msgspec.Struct, tag=True, frozen=True):
    """Of the micro-batches' sequences in order, float32 [T]: the state before each token that has a loss weight, else
    0. None on ranks that do not report."""

    values: list[np.ndarray] | None = None


class WeightsDigest(msgspec.Struct, tag=True, frozen=True):
    """What this rank holds of the trainer, and its digest, see :mod:`miles_spmd.ledger.rectangles`."""

    of_weights: list[Rectangle]
    of_updates: list[Rectangle]  # of gradient and optimizer state, which may lie elsewhere
    weights: np.ndarray  # uint64


class CheckpointResult(msgspec.Struct, tag=True, frozen=True):
    """The optimizer's state by role and kind, uint64 over ``of_updates``; empty where no ledger is kept."""

    optimizers: dict[Role, dict[str, np.ndarray]]


class RefitResult(msgspec.Struct, tag=True, frozen=True):
    version: int
    bytes_local: int  # copied within this process
    bytes_received: int  # from other ranks
    checksum_mismatches: int


class Ok(msgspec.Struct, tag=True, frozen=True):
    detail: dict[str, Any] = {}


class Failure(msgspec.Struct, tag=True, frozen=True):
    """A typed error: what, where, and the traceback for the log."""

    kind: str
    message: str
    traceback: str = ""


class Bisection(msgspec.Struct, tag=True, frozen=True):
    """``response``: tokens that the engine sampled. ``operator``: "" where no output differs."""

    response: list[int]
    operator: str = ""
    order: int = 0  # of the operator in the model
    what: str = ""  # how much differs, in words


Result = (
    Ok
    | TrainResult
    | LogProbsResult
    | ValuesResult
    | WeightsDigest
    | CheckpointResult
    | RefitResult
    | Bisection
    | Failure
)


class Reply(msgspec.Struct, tag=True, frozen=True):
    id: int  # of the command
    rank: int
    host: str
    phase: Phase
    result: Result
    seconds: dict[str, float] = {}  # where the time went, by part
    memory: dict[str, float] = {}  # what this rank has to say for the metrics ``memory/...``


Message = Command | Hello | Heartbeat | Completions | Reply


# --- bytes -----------------------------------------------------------------------------------------------------------


NUMBERS = "biuf"  # kinds of numpy dtypes that travel: bool, integers, floats


class WireError(ValueError):
    """What is no message of ours, with the reason."""


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in NUMBERS:
        return (value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes())
    what = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise WireError(f"{what} cannot be sent over the wire")


def _decode_array(kind: type, value: Any) -> Any:
    if kind is np.ndarray:
        dtype, shape, data = value
        if np.dtype(dtype).kind not in NUMBERS:
            raise ValueError(f"array of dtype {dtype} is not allowed on the wire")
        return np.frombuffer(data, np.dtype(dtype)).reshape(shape)
    raise TypeError(f"no wire form for {kind}")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_decoder = msgspec.msgpack.Decoder(Message, dec_hook=_decode_array)


def encode(message: Message) -> bytes:
    """Raises WireError when the message holds something that has no wire form."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> Message:
    """Raises WireError on anything that is not one of our messages."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        raise WireError(f"not a message of this protocol: {error}") from error
