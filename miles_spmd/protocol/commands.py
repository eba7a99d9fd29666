"""Every command that the controller can send, each declared once.

A subclass of :class:`Command` states with the struct itself which ranks receive it, in which phase they execute it (and
so its deadline), and the type of the result that each of them replies with. The decoder's union, the routing and the
check of replies are derived from these declarations; :class:`miles_spmd.worker.worker.Worker` has one handler for each.
"""

from __future__ import annotations

from enum import Enum, auto
from functools import reduce
from operator import or_
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, get_args

import msgspec

from miles_spmd.protocol import results
from miles_spmd.types.phase import Phase
from miles_spmd.types.request import Request
from miles_spmd.types.role import Role
from miles_spmd.types.train_sequence import MicroBatch

R_co = TypeVar("R_co", bound=results.Result | None, covariant=True)


class Receivers(Enum):
    """The ranks that a command is sent to; all but the last are those of one engine group."""

    TRAINERS = auto()
    ENGINES = auto()
    LEADERS = auto()  # the first rank of each engine
    GROUP = auto()  # trainers and engines
    ALL = auto()


class Command(msgspec.Struct, Generic[R_co], tag=True, frozen=True):
    """Base of all commands. The type argument is the result of each receiver; None for a command without a reply."""

    receivers: ClassVar[Receivers]
    phase: ClassVar[Phase]
    abandonable: ClassVar[bool] = False  # it has no effect before its last forward pass, and can be left until then
    by_one_cell: ClassVar[bool] = False  # where ranks are divided into cells, which are replicas, one of them does it

    @classmethod
    def result_type(cls) -> type[results.Result | None]:
        """The type argument of the declaration; NoneType for a command without a reply."""
        (argument,) = get_args(cls.__orig_bases__[0])  # type: ignore[attr-defined]
        return argument

    @classmethod
    def has_reply(cls) -> bool:
        return cls.result_type() is not NoneType


# --- generation ------------------------------------------------------------------------------------------------------


class Generate(Command[results.Ok], frozen=True):
    """Open a rollout. The reply comes when :class:`EndGenerate` was received and no request is left; until then
    :class:`Submit` and :class:`AbortRequests` feed the rollout and Completions stream back."""

    receivers, phase = Receivers.ENGINES, Phase.ROLLOUT


class Submit(Command[None], frozen=True):
    """Add requests to an open rollout."""

    receivers, phase = Receivers.LEADERS, Phase.ROLLOUT
    requests: list[Request]


class AbortRequests(Command[None], frozen=True):
    """Stop these requests of an open rollout; the tokens that they have so far come back as ABORT."""

    receivers, phase = Receivers.LEADERS, Phase.ROLLOUT
    rids: list[str]


class EndGenerate(Command[None], frozen=True):
    """Close a rollout: no further request will be submitted."""

    receivers, phase = Receivers.LEADERS, Phase.ROLLOUT


class RefitEngine(Command[results.RefitResult], frozen=True):
    """Copy the trainer's weights into the engine as ``version``."""

    receivers, phase = Receivers.GROUP, Phase.REFIT
    version: int


class LoadWeights(Command[results.Ok], frozen=True):
    """Read the Hugging Face checkpoint in the folder ``path`` into the engine as ``version``. Where a rank cannot, no
    engine has changed, and ``detail`` has the ``problem``."""

    receivers, phase = Receivers.ENGINES, Phase.REFIT
    path: str
    version: int


class ReplaceEngines(Command[results.Ok], frozen=True):
    """Build every engine anew. Those that are trained have no weights before the next :class:`RefitEngine`; others load
    their checkpoint."""

    receivers, phase = Receivers.GROUP, Phase.REFIT


# --- training --------------------------------------------------------------------------------------------------------


class ComputeLogProbs(Command[results.LogProbsResult], frozen=True):
    """Run the network of ``role`` forward."""

    receivers, phase = Receivers.TRAINERS, Phase.LOG_PROBS
    abandonable = True
    micro_batches: list[MicroBatch]
    role: Role = Role.ACTOR
    top_k: int = 0  # how many of the most likely tokens to return at each position


class ComputeValues(Command[results.ValuesResult], frozen=True):
    """Run the critic or a reward model forward."""

    receivers, phase = Receivers.TRAINERS, Phase.LOG_PROBS
    abandonable = True
    micro_batches: list[MicroBatch]
    role: Role = Role.CRITIC


class TrainStep(Command[results.TrainResult], frozen=True):
    """Make one optimizer step on this rank's share of the global batch."""

    receivers, phase = Receivers.TRAINERS, Phase.TRAIN
    abandonable = True
    micro_batches: list[MicroBatch]
    role: Role = Role.ACTOR


class ComputePart(Command[results.PartResult], frozen=True):
    """Compute one of the parts into which cells divide the batch of update number ``update``, and keep its gradient.
    Those of other updates are forgotten. A part that is kept already is not computed again."""

    receivers, phase = Receivers.TRAINERS, Phase.TRAIN
    abandonable = True
    update: int
    part: int
    micro_batches: list[MicroBatch]
    role: Role = Role.ACTOR


class MakeUpdate(Command[results.UpdateResult], frozen=True):
    """Agree with the other cells on who takes part in update number ``update``, catch up with them, fetch the parts
    that they have, and make the update."""

    receivers, phase = Receivers.TRAINERS, Phase.TRAIN
    update: int
    role: Role = Role.ACTOR


class MeetCells(Command[results.MeetResult], frozen=True):
    """Agree with the other cells on who is there, and catch up with them. ``founds``: this cell is one of those with
    which the run begins, so that what it has now is what later ones have to catch up with."""

    receivers, phase = Receivers.TRAINERS, Phase.TRAIN
    founds: bool = False


class SnapshotWeights(Command[results.Ok], frozen=True):
    """Copy the actor's present weights to the reference policy or the old actor."""

    receivers, phase = Receivers.TRAINERS, Phase.TRAIN
    role: Role


class Bisect(Command[results.Bisection], frozen=True):
    """Run ``request`` in the engine and its tokens in the trainer, and compare the operators' outputs for the first
    ``tokens`` tokens."""

    receivers, phase = Receivers.TRAINERS, Phase.LOG_PROBS
    by_one_cell = True
    request: Request
    tokens: int


# --- weights on disk -------------------------------------------------------------------------------------------------


class DigestWeights(Command[results.WeightsDigest], frozen=True):
    """Compute the digests of the weights that ``role`` trains."""

    receivers, phase = Receivers.TRAINERS, Phase.CHECKPOINT
    by_one_cell = True
    role: Role = Role.ACTOR


class SaveCheckpoint(Command[results.CheckpointResult], frozen=True):
    """Begin to write weights and optimizer states of everything that is trained into the folder ``path``, "": only
    return their digests. The reply comes when the run may go on; a rank's next work waits until all is copied."""

    receivers, phase = Receivers.TRAINERS, Phase.CHECKPOINT
    by_one_cell = True
    path: str


class FinishSave(Command[results.SaveProgress], frozen=True):
    """Report whether the checkpoint in the folder ``path`` ("": any) is written; with ``wait``, reply when it is."""

    receivers, phase = Receivers.TRAINERS, Phase.CHECKPOINT
    by_one_cell = True
    wait: bool
    path: str = ""


class LoadCheckpoint(Command[results.CheckpointResult], frozen=True):
    """Read what :class:`SaveCheckpoint` wrote; ``digests`` are those of :class:`FinishSave`'s results by rank, of each
    model."""

    receivers, phase = Receivers.TRAINERS, Phase.CHECKPOINT
    path: str
    digests: dict[str, list[str]] = {}


class ExportModel(Command[results.Ok], frozen=True):
    """Write the actor's weights as a Hugging Face checkpoint into the folder ``path``."""

    receivers, phase = Receivers.TRAINERS, Phase.CHECKPOINT
    by_one_cell = True
    path: str


class Stop(Command[results.Ok], frozen=True):
    """Leave the command loop and exit with ``status``."""

    receivers, phase = Receivers.ALL, Phase.STOP
    status: int = 0


# --- what follows from the declarations ------------------------------------------------------------------------------

COMMANDS: tuple[type[Command[Any]], ...] = tuple(Command.__subclasses__())
RESULTS = tuple(dict.fromkeys([*(kind.result_type() for kind in COMMANDS if kind.has_reply()), results.Abandoned]))

if TYPE_CHECKING:
    AnyCommand = Command[Any]
    AnyResult = results.Result
else:  # the decoder has to know every type by name
    AnyCommand = reduce(or_, COMMANDS)
    AnyResult = reduce(or_, RESULTS)
