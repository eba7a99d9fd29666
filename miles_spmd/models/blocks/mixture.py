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
from miles_spmd.models.blocks.experts import SWIGLU, Experts, Router
from miles_spmd.models.blocks.mlp import DOWN, GATE, UP, Mlp
from miles_spmd.models.layout import stack

# Stacks of SGLang and of our own layer for Megatron, which has gate and up apart; parameters of Transformer Engine's
# grouped linear layers, in which experts are numbered among those of the rank
EXPERT = re.compile(r"experts\.(w13_weight|w2_weight|gate_up|linear_fc[12]\.weight(?=\d))(\d*)")


@dataclass(frozen=True)
class Mixture(Block):
    """Routed experts, and possibly one MLP beside them that every token has."""

    hidden_size: int
    ffn_size: int
    router: Router
    form: Experts = SWIGLU
    """What an expert computes."""
    shared_size: int = 0
    """Width of the shared experts together; 0: there are none."""
    shared_gate: bool = False
    """The output of the shared experts is multiplied by a sigmoid of the token's own."""
    name: str = "mlp"
    shared_name: str = "shared_experts"
    names: tuple[str, str, str] = (GATE, UP, DOWN)
    """The checkpoint's names of an expert's gate, up and down projection."""
    bias_name: str = "gate.e_score_correction_bias"

    @property
    def num_experts(self) -> int:
        return self.router.count

    @property
    def is_plain(self) -> bool:
        """Whether Megatron's router and experts compute the same: a softmax, SwiGLU, nothing beside."""
        router = Router(self.num_experts, self.router.per_token, softmax_first=self.router.softmax_first)
        return (self.router, self.form, self.shared_size) == (router, SWIGLU, 0)

    @cached_property
    def experts(self) -> list[Mlp]:
        def expert(number: int) -> Mlp:
            return Mlp(self.hidden_size, self.ffn_size, name=f"{self.name}.experts.{number}", names=self.names)

        return [expert(number) for number in range(self.num_experts)]

    @cached_property
    def shared(self) -> Mlp | None:
        if not self.shared_size:
            return None
        return Mlp(self.hidden_size, self.shared_size, name=f"{self.name}.{self.shared_name}")

    @cached_property
    def _tensors(self) -> dict[str, Shape]:
        return {name: shape for part in (self._replicated, *self._shards) for name, shape in part.items()}

    @property
    def _replicated(self) -> dict[str, Shape]:
        """The shapes of tensors of which every rank has all."""
        tensors: dict[str, Shape] = {f"{self.name}.gate.weight": (self.num_experts, self.hidden_size)}
        if self.router.bias:
            tensors[f"{self.name}.{self.bias_name}"] = (self.num_experts,)
        if self.shared_gate:
            tensors[f"{self.name}.shared_expert_gate.weight"] = (1, self.hidden_size)
        return tensors

    @property
    def _shards(self) -> list[dict[str, Shape]]:
        return [mlp.tensors() for mlp in (*self.experts, *filter(None, [self.shared]))]

    def tensors(self) -> dict[str, Shape]:
        return self._tensors

    def pieces(self, name: str, shape: Shape, shards: Shards, backend: Backend) -> Pieces:
        if name in self._replicated:
            return self.whole(name)
        if self.shared and name.startswith(f"{self.shared.name}."):
            return self.shared.pieces(name, shape, shards, backend)
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
        experts = self.num_experts * count(self.experts[0].tensors())
        dense = Elements(count(self._replicated))
        if self.shared:
            dense = dense.plus(self.shared.held(sizes))
        # an engine divides its experts among all of its ranks, whole ones or a part of each
        return dense.plus(Elements(0, experts // (sizes.tp if sizes.engine else sizes.etp * sizes.ep)))

    @property
    def unused(self) -> int:
        return (self.num_experts - self.router.per_token) * count(self.experts[0].tensors())

    def activations(self, sizes: Sizes, recomputes: bool) -> int:
        """Of gate, up and their product of each expert chosen, and its own copy of its input; our own layers make the
        product, and the experts' outputs, again."""
        wide = self.ffn_size // sizes.etp
        each = 2 * wide + self.hidden_size if recomputes else 3 * wide + 2 * self.hidden_size
        return self.router.per_token * each + (self.shared.activations(sizes, recomputes) if self.shared else 0)
