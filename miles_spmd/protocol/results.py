"""What ranks reply to commands. Arrays are per sequence, in the order of the command's micro-batches."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np

from miles_spmd.ledger.rectangles import Rectangle
from miles_spmd.types.role import Role


class Result(msgspec.Struct, tag=True, frozen=True):
    """What a rank replies to a command that it has done."""


class Ok(Result, frozen=True):
    """The reply to a command that computes nothing for the controller."""

    detail: dict[str, Any] = {}


class Abandoned(Result, frozen=True):
    """All ranks have left the command before the same forward pass; it has had no effect."""


class UpdateDigests(msgspec.Struct, frozen=True):
    """One digest, uint64, for each rectangle that :class:`WeightsDigest` lists."""

    gradient: np.ndarray  # over ``of_updates``: summed over all ranks, before clipping
    weights: np.ndarray  # over ``of_weights``: after the update


class TrainResult(Result, frozen=True):
    """One optimizer step of one rank.

    ``sums`` are the rank's own sums, one dict for each leaf of the canonical reduction that it holds (one dict without
    that reduction); the controller adds them over the ranks with ``reports``. Under context parallelism each of its
    ranks reports its own tokens.
    """

    sums: list[dict[str, float]]
    grad_norm: float
    lr: float
    skipped: str = ""  # why no update was made: "non-finite loss", "non-finite gradient"
    log_probs: list[np.ndarray] | None = None  # float32 [T] per sequence, before the update
    digests: UpdateDigests | None = None  # only where a ledger is kept


class PartResult(Result, frozen=True):
    """What came of one part of a batch on one rank; fields as in :class:`TrainResult`."""

    sums: list[dict[str, float]]
    log_probs: list[np.ndarray] | None = None


class UpdateResult(Result, frozen=True):
    """What came of an update that cells make together; fields as in :class:`TrainResult`."""

    grad_norm: float = math.nan
    lr: float = math.nan
    skipped: str = ""
    digests: UpdateDigests | None = None
    lost: str = ""  # why this cell has not made it; its weights are what they were
    missing: list[int] = []  # the parts that no cell had, where that is why
    overwritten: list[int] = []  # otherwise those that this cell has to compute again


class MeetResult(Result, frozen=True):
    """What a cell has after it has met the others."""

    updates: int  # that were made since the run began, by all trainers
    received: int = 0  # bytes of state that came from another cell, 0 where this one was not behind
    problem: str = ""  # why it could not meet them, or catch up


class LogProbsResult(Result, frozen=True):
    """Log-probs per sequence; entry 0 of each is 0. A field is None on ranks that do not report, and where the command
    did not request it."""

    log_probs: list[np.ndarray] | None = None  # float32 [T]
    candidates: list[np.ndarray] | None = None  # int32 [T, top_k], the most likely tokens
    candidate_log_probs: list[np.ndarray] | None = None  # float32 [T, top_k]
    given_log_probs: list[np.ndarray] | None = None  # float32 [T, K], of the sequences' own ``candidates``


class ValuesResult(Result, frozen=True):
    """The value of the state before each token with a loss weight, else 0. None on ranks that do not report."""

    values: list[np.ndarray] | None = None  # float32 [T]


class WeightsDigest(Result, frozen=True):
    """The parts of the trainer's tensors that this rank holds, and a digest of each weight; see
    :mod:`miles_spmd.ledger.rectangles`."""

    of_weights: list[Rectangle]
    of_updates: list[Rectangle]  # of gradient and optimizer state, which may be sharded otherwise
    weights: np.ndarray  # uint64, one for each of ``of_weights``


class CheckpointResult(Result, frozen=True):
    """Digests of what was saved or loaded."""

    optimizers: dict[Role, dict[str, np.ndarray]]
    """Of the optimizer state, by role and kind: uint64, one for each of ``of_updates``; empty without a ledger."""
    problem: str = ""
    """Why a checkpoint cannot be loaded; the rank's state is undefined then, until another one was loaded."""


class SaveProgress(Result, frozen=True):
    """How far this rank is with the checkpoint that it writes in the background."""

    done: bool
    problem: str = ""  # why it could not be written
    digests: dict[str, str] = {}  # of the index that the rank has written of each model, by the model's folder
    nbytes: int = 0
    seconds: float = 0.0  # of writing
    lost: bool = False  # another cell has begun it, which was lost


class RefitResult(Result, frozen=True):
    """What a refit copied into this rank's engine."""

    version: int
    bytes_local: int  # copied within this process
    bytes_received: int  # from other ranks
    checksum_mismatches: int


class Bisection(Result, frozen=True):
    """The first operator of this rank's layers whose output differs between engine and trainer."""

    response: list[int]  # tokens that the engine sampled
    operator: str = ""  # "": no output differs
    order: int = 0  # position of the operator in the model
    what: str = ""  # the size of the difference, as text
