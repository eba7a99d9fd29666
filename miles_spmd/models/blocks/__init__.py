"""What a layer of a decoder consists of, described once for trainer, engine, checkpoint and plan. Imports no torch."""

from __future__ import annotations

from miles_spmd.models.blocks.attention import Attention
from miles_spmd.models.blocks.block import Elements, Pieces, Shape, Shard, Shards, Sizes
from miles_spmd.models.blocks.layer import Layer, Norms, within
from miles_spmd.models.blocks.mixture import Mixture
from miles_spmd.models.blocks.mlp import Mlp

__all__ = [
    "Attention",
    "Elements",
    "Layer",
    "Mixture",
    "Mlp",
    "Norms",
    "Pieces",
    "Shape",
    "Shard",
    "Shards",
    "Sizes",
    "within",
]
