"""What every block of a model says: its tensors in a checkpoint, how both backends hold them, and what it costs.

A block knows nothing about its place: names are relative to its layer, and its sizes are those of the whole model.
Parameters are asked for by SGLang's name, which is the checkpoint's where nothing is fused; :mod:`.layer` translates
Megatron's.
"""

from __future__ import annotations

from math import prod
from typing import Literal, NamedTuple

from miles_spmd.models.layout import PADDING, Piece, Span, beside, whole, window

Shape = tuple[int, ...]
Pieces = tuple[Piece, ...]
Backend = Literal["megatron", "sglang"]


class Shard(NamedTuple):
    """One rank of a tensor-parallel group."""

    rank: int
    size: int

    def part(self, total: int, what: str) -> tuple[int, int]:
        """Return this rank's [start, stop) of ``total`` things that all ranks have equal shares of. Raises ValueError,
        naming ``what``, when the size does not divide ``total``."""
        if total % self.size:
            raise ValueError(f"{what}: {total} is not divisible by a tensor-parallel size of {self.size}")
        each = total // self.size
        return self.rank * each, (self.rank + 1) * each


class Shards(NamedTuple):
    """One rank in its groups of tensor parallelism, of experts' tensor parallelism, of expert parallelism."""

    tp: Shard
    etp: Shard
    ep: Shard


class Sizes(NamedTuple):
    """Sizes of the groups that a rank shares a layer with, and whether the layers are those of an engine."""

    tp: int = 1
    etp: int = 1
    ep: int = 1
    engine: bool = False


class Elements(NamedTuple):
    """Numbers that one rank holds: of experts, and of everything else."""

    dense: int
    expert: int = 0

    def plus(self, other: Elements) -> Elements:
        return Elements(self.dense + other.dense, self.expert + other.expert)


class Block:
    """A part of a layer that the residual stream passes through."""

    def tensors(self) -> dict[str, Shape]:
        """Return the shapes of the block's tensors in a checkpoint, by their names within its layer."""
        raise NotImplementedError

    def pieces(self, name: str, shape: Shape, shards: Shards, backend: Backend) -> Pieces:
        """Return what the parameter ``name`` of the local ``shape`` consists of; nothing where the block has no such
        parameter. Raises ValueError where it cannot be divided so."""
        raise NotImplementedError

    def held(self, sizes: Sizes) -> Elements:
        """Return how many parameters one rank holds."""
        raise NotImplementedError

    @property
    def unused(self) -> int:
        """Number of parameters that one token's forward pass does not use."""
        return 0

    def activations(self, sizes: Sizes, recomputes: bool) -> int:
        """Return the numbers per token that one rank keeps for the backward pass. ``recomputes``: our own layers,
        which compute some of them again."""
        raise NotImplementedError

    # ---- how the backends shard, fuse and pad ----

    def whole(self, name: str) -> Pieces:
        shape = self.tensors().get(name)
        return whole(name, shape) if shape else ()

    def column_shard(self, name: str, tp: Shard, padded: int = 0, lead: tuple[int, ...] = ()) -> Pieces:
        """This rank's share of the columns of a matrix, of which there are ``padded`` with padding."""
        rows, width = self.tensors()[name]
        return beside(share(name, width, tp, padded), rows, lead)


def share(name: str, size: int, tp: Shard, padded: int = 0, first: int = 0) -> list[Span]:
    """Return this rank's share of ``size`` rows (or columns) of a tensor from ``first`` on, of which there are
    ``padded`` with padding."""
    padded = padded or size
    return window([(name, first, first + size), (PADDING, 0, padded - size)], *tp.part(padded, name))


def padded_width(ffn_size: int, local: int, split: Shard, tp: Shard) -> int:
    """Return the width of an MLP that is split into parts of the width ``local``: without a GPU, SGLang rounds it up to
    a multiple of 32 per rank of the engine, also where experts are whole."""
    rounded = -(-ffn_size // (32 * tp.size)) * 32 * tp.size
    return rounded if local * split.size == rounded else ffn_size


def count(tensors: dict[str, Shape]) -> int:
    return sum(map(prod, tensors.values()))
