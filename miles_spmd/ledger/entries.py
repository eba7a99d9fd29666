"""The entries of a ledger: a run's conditions, and digests of everything that each step read and computed.

Arrays of digests are bytes: little-endian uint64, in the order of samples or of tensors' names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import xxhash

FOLDER = "ledger"  # in the run's folder
Digests = bytes
Number = float | None  # None: not finite


class LedgerError(RuntimeError):
    """A ledger that is missing, is inconsistent, or belongs to another run."""


class Context(msgspec.Struct, tag="context", frozen=True):
    """The conditions of the steps from ``step`` on: the first entry, and again if a run is resumed under others."""

    step: int
    config: dict[str, Any]  # settings that can affect a number
    code: str  # digest of this package, compiled kernels included
    environment: dict[str, Any]
    tensors: dict[str, list[str]]  # names of the checkpoint's tensors, by role; in a second policy by policy/role
    weights: dict[str, Digests]  # before the step, by role


class Samples(msgspec.Struct, frozen=True, rename={"responses": "answers"}):  # the name on disk
    """Digests of a rollout, one per sample in order of submission."""

    dropped: int  # groups that the filter did not keep
    requests: Digests  # uid, index, seed, prompt, and role where there are roles
    responses: Digests  # tokens, loss mask, finish reason, weight versions
    log_probs: Digests  # of the engine
    rewards: Digests


class Update(msgspec.Struct, frozen=True):
    """Digests of one optimizer step of one role: per sequence in the order of the batch, or per tensor."""

    role: str
    inputs: Digests  # all fields of TrainSequence but the advantages
    advantages: Digests
    log_probs: Digests  # or values, before the update
    sums: dict[str, Number]  # of the loss, over all ranks
    gradient: Digests
    grad_norm: Number
    lr: float
    skipped: str
    weights: Digests  # after the update


class Step(msgspec.Struct, tag="step", frozen=True):
    step: int
    samples: Samples | None  # None: responses were given, by the dataset or by the run that is replayed
    updates: list[Update]


class Saved(msgspec.Struct, tag="saved", frozen=True):
    """Digests of a checkpoint before ``step``: weights by role, optimizer state by role and kind."""

    step: int
    weights: dict[str, Digests]
    optimizers: dict[str, dict[str, Digests]]


Entry = Context | Step | Saved


def digest(*values: np.ndarray | str | float | int | None) -> int:
    """Return a 64-bit digest of the values, at 8 GB/s. It is not cryptographic: it detects errors, not forgery."""
    state = xxhash.xxh3_64()
    for value in values:
        if isinstance(value, np.ndarray):
            state.update(f"{value.dtype.str}{value.shape}".encode())
            state.update(np.ascontiguousarray(value).data)
        else:
            state.update(f"{type(value).__name__}:{value!r};".encode())
    return state.intdigest()


def digests(values: Iterable[int]) -> Digests:
    """Encode digests."""
    return np.fromiter(values, np.uint64).astype("<u8").tobytes()


def unpack(values: Digests) -> np.ndarray:
    """Decode digests, uint64."""
    return np.frombuffer(values, "<u8")
