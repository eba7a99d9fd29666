"""A mixture of experts in the place of an MLP (https://arxiv.org/abs/1701.06538)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from miles_spmd.models.blocks.block import (
    Backend,
    Block,
    Elements,
    Pieces,
    Shape,
    Shards,
    Sizes,
    count,
    padded_width,
)
from miles_spmd.models.blocks.mlp import DOWN, GATE, UP, Mlp
from miles_spmd.models.layout import stack

# Stacks of SGLang and of our own layer for Megatron, which has gate and up apart; parameters of Transformer Engine's
# grouped linear layers, in which experts are numbered among those of the rank
EXPERT = re.compile(r"experts\.(w13_weight|w2_weight|gate_up|linear_fc[12]\.weight(?=\d))(\d*)")


@dataclass(frozen=True)
class Mixture(Block):
    """Experts without a shared one, chosen by the softmax of a router's logits."""

    hidden_size: int
    ffn_size: int
    num_experts: int
    per_token: int
    normalize: bool = True
    """The weights of a token's experts sum to 1."""
    name: str = "mlp"
    names: tuple[str, str, str] = (GATE, UP, DOWN)
    """The checkpoint's names of an expert's gate, up and down projection."""

    @cached_property
    def experts(self) -> list[Mlp]:
        def expert(number: int) -> Mlp:
            return Mlp(self.hidden_size, self.ffn_size, name=f"{self.name}.experts.{number}", names=self.names)

        return [expert(number) for number in range(self.num_experts)]

    @cached_property
    def _tensors(self) -> dict[str, Shape]:
        tensors: dict[str, Shape] = {f"{self.name}.gate.weight": (self.num_experts, self.hidden_size)}
        for expert in self.experts:
            tensors |= expert.tensors()
        return tensors

    def tensors(self) -> dict[str, Shape]:
        return self._tensors

    def pieces(self, name: str, shape: Shape, shards: Shards, backend: Backend) -> Pieces:
        if name == f"{self.name}.gate.weight":
            return self.whole(name)
        tp, etp, ep = shards
        if backend == "sglang":
            # SGLang's ep_size is 1 or tp_size; experts are whole in the second case
            apart = ".experts." in name and shape[0] < self.num_experts
            tp, etp, ep = (tp, type(tp)(0, 1), tp) if apart else (tp, tp, type(tp)(0, 1))
        experts = [self.experts[i] for i in range(*ep.part(self.num_experts, f"{self.name}.experts"))]
        match = EXPERT.fullmatch(name.removeprefix(f"{self.name}."))
        if match is None or int(match[2] or 0) >= len(experts):
            return ()
        # a stack of the rank's experts, or one of them
        held = [((), experts[int(match[2])])] if match[2] else [((i,), expert) for i, expert in enumerate(experts)]
        if match[1] == "gate_up":
            return tuple(
                piece
                for lead, expert in held
                for side in range(2)
                for piece in stack(expert.half(side, etp), (self.hidden_size,), (*lead, side))
            )
        if match[1] in ("w13_weight", "linear_fc1.weight"):
            width = padded_width(self.ffn_size, shape[-2] // 2, etp, tp)
            return tuple(piece for lead, expert in held for piece in expert.gate_up(etp, width, lead))
        width = padded_width(self.ffn_size, shape[-1], etp, tp)
        return tuple(piece for lead, expert in held for piece in expert.down(etp, width, lead))

    def held(self, sizes: Sizes) -> Elements:
        router = self.num_experts * self.hidden_size
        experts = self.num_experts * count(self.experts[0].tensors())
        # an engine divides its experts among all of its ranks, whole ones or a part of each
        return Elements(router, experts // (sizes.tp if sizes.engine else sizes.etp * sizes.ep))

    @property
    def unused(self) -> int:
        return (self.num_experts - self.per_token) * count(self.experts[0].tensors())

    def activations(self, sizes: Sizes, recomputes: bool) -> int:
        """Of gate, up and their product of each expert chosen, and its own copy of its input; our own layers make the
        product, and the experts' outputs, again."""
        wide = self.ffn_size // sizes.etp
        return self.per_token * (2 * wide + self.hidden_size if recomputes else 3 * wide + 2 * self.hidden_size)
