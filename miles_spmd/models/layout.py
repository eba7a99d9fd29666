"""Who holds which slice of which checkpoint tensor.

A Hugging Face checkpoint gives every weight one name and one shape. Trainer and engine cut, fuse and interleave those
tensors each in their own way; both describe it in the same words, as rectangles of checkpoint tensors. Loading,
export and refit are then one operation: intersect rectangles and copy.
"""

from __future__ import annotations

import msgspec


class Piece(msgspec.Struct, frozen=True):
    """A rectangle of the checkpoint tensor ``name`` lying at ``local`` inside a local tensor.

    ``start``, ``local`` and ``shape`` have one entry per dimension of the checkpoint tensor. ``lead`` indexes leading
    dimensions that only the local tensor has (a stack of experts).
    """

    name: str
    start: tuple[int, ...]
    local: tuple[int, ...]
    shape: tuple[int, ...]
    lead: tuple[int, ...] = ()


class TensorLayout(msgspec.Struct, frozen=True):
    """One local tensor: its own name, and the checkpoint rectangles that fill it."""

    local_name: str
    pieces: tuple[Piece, ...]
