"""What the ledger says of a run: what it ran under, and of every step each thing that was read and computed.

Arrays of digests are bytes: little-endian uint64, in the order of samples or of tensors' names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np
import xxhash

Digests = bytes
Number = float | None  # None: not finite


class Context(msgspec.Struct, tag="context", frozen=True):
    """What steps from ``step`` on ran under. The first entry, and again where a run goes on under something else."""

    step: int
    config: dict[str, Any]  # of what can matter to a number
    code: str  # digest of this package, compiled kernels included
    environment: dict[str, Any]
    tensors: dict[str, list[str]]  # names of the checkpoint's tensors, by role
    weights: dict[str, Digests]  # before the step, by role


class Samples(msgspec.Struct, frozen=True, rename={"responses": "answers"}):  # as ledgers on disk have it
    """A rollout, sample by sample, in order of submission."""

    dropped: int  # groups that the filter did not keep
    requests: Digests  # uid, index, seed, prompt
    responses: Digests  # tokens, mask, reason of the end, weight versions
    log_probs: Digests  # of the engine
    rewards: Digests


class Update(msgspec.Struct, frozen=True):
    """One optimizer step of one role, sequence by sequence in the order of the batch, tensor by tensor."""

    role: str
    inputs: Digests  # tokens, global loss weights, log-probs of old and reference policy: all but the advantages
    advantages: Digests
    log_probs: Digests  # or values, before the update
    sums: dict[str, Number]  # of the loss, over all ranks
    gradient: Digests
    grad_norm: Number
    lr: float
    skipped: str
    weights: Digests  # after it


class Step(msgspec.Struct, tag="step", frozen=True):
    step: int
    samples: Samples | None  # None: answers are in the data
    updates: list[Update]


class Saved(msgspec.Struct, tag="saved", frozen=True):
    """A checkpoint before ``step``: weights by role, the optimizers' state by role and kind."""

    step: int
    weights: dict[str, Digests]
    optimizers: dict[str, dict[str, Digests]]


Entry = Context | Step | Saved


def digest(*things: np.ndarray | str | float | int | None) -> int:
    """64 bits of anything, 8 GB/s: a change is seen but for a collision; nobody is to be kept from making one."""
    state = xxhash.xxh3_64()
    for thing in things:
        if isinstance(thing, np.ndarray):
            state.update(f"{thing.dtype.str}{thing.shape}".encode())
            state.update(np.ascontiguousarray(thing).data)
        else:
            state.update(f"{type(thing).__name__}:{thing!r};".encode())
    return state.intdigest()


def digests(values: Iterable[int]) -> Digests:
    return np.fromiter(values, np.uint64).astype("<u8").tobytes()


def tensor_digests(totals: Mapping[str, int]) -> Digests:
    """Of tensors by name, in the order of the names."""
    return digests(totals[name] for name in sorted(totals))


def unpack(values: Digests) -> np.ndarray:
    """uint64"""
    return np.frombuffer(values, "<u8")
