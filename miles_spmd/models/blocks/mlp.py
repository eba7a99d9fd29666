"""The gated MLP of a dense layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles_spmd.models.blocks.block import (
    Backend,
    Block,
    Elements,
    Pieces,
    Shape,
    Shard,
    Shards,
    Sizes,
    count,
    padded_width,
    share,
)
from miles_spmd.models.layout import stack

Activation = Literal["silu", "gelu_tanh"]
GATE, UP, DOWN = "gate_proj.weight", "up_proj.weight", "down_proj.weight"


@dataclass(frozen=True)
class Mlp(Block):
    """down(activation(gate(x)) * up(x)) (https://arxiv.org/abs/2002.05202)."""

    hidden_size: int
    ffn_size: int
    activation: Activation = "silu"
    name: str = "mlp"
    fused: bool = False
    """The checkpoint has one matrix ``gate_up_proj`` in place of two."""
    names: tuple[str, str, str] = (GATE, UP, DOWN)
    """The checkpoint's names of gate, up and down projection."""

    def tensors(self) -> dict[str, Shape]:
        gate, up, down = (f"{self.name}.{leaf}" for leaf in self.names)
        matrices: dict[str, Shape] = {gate: (self.ffn_size, self.hidden_size), up: (self.ffn_size, self.hidden_size)}
        if self.fused:
            matrices = {f"{self.name}.gate_up_proj.weight": (2 * self.ffn_size, self.hidden_size)}
        return matrices | {down: (self.hidden_size, self.ffn_size)}

    def pieces(self, name: str, shape: Shape, shards: Shards, backend: Backend) -> Pieces:
        tp = shards.tp
        if name == f"{self.name}.gate_up_proj.weight":
            return self.gate_up(tp, padded_width(self.ffn_size, shape[0] // 2, tp, tp))
        if name == f"{self.name}.down_proj.weight":
            return self.down(tp, padded_width(self.ffn_size, shape[1], tp, tp))
        return ()

    def gate_up(self, tp: Shard, padded: int = 0, lead: tuple[int, ...] = ()) -> Pieces:
        """This rank's rows of the gate projection, then those of the up projection."""
        both = [*self.half(0, tp, padded), *self.half(1, tp, padded)]
        return stack(both, (self.hidden_size,), lead)

    def half(self, side: int, tp: Shard, padded: int = 0) -> list[tuple[str, int, int]]:
        """This rank's rows of the gate projection (0) or the up projection (1)."""
        if self.fused:
            return share(f"{self.name}.gate_up_proj.weight", self.ffn_size, tp, padded, side * self.ffn_size)
        return share(f"{self.name}.{self.names[side]}", self.ffn_size, tp, padded)

    def down(self, tp: Shard, padded: int = 0, lead: tuple[int, ...] = ()) -> Pieces:
        return self.column_shard(f"{self.name}.{self.names[2]}", tp, padded, lead)

    def held(self, sizes: Sizes) -> Elements:
        return Elements(count(self.tensors()) // sizes.tp)

    def activations(self, sizes: Sizes, recomputes: bool) -> int:
        """Of gate, up and their product."""
        return 3 * self.ffn_size // sizes.tp
