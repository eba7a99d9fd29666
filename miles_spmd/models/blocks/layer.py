"""One layer of a decoder: attention, then an MLP or experts, each with norms around it and added to its input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import msgspec

from miles_spmd.models.blocks.attention import Attention
from miles_spmd.models.blocks.block import Backend, Elements, Pieces, Shape, Shards, Sizes
from miles_spmd.models.blocks.mixture import Mixture
from miles_spmd.models.blocks.mlp import Mlp
from miles_spmd.models.layout import whole


@dataclass(frozen=True)
class Norms:
    """The checkpoint's names of a layer's norms; "" where there is none."""

    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""

    def __iter__(self) -> Iterator[str]:
        return filter(None, (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp))


@dataclass(frozen=True)
class Layer:
    """x + after(attention(before(x))), then the same with ``mlp``."""

    attention: Attention
    mlp: Mlp | Mixture
    norms: Norms = Norms()

    @property
    def hidden_size(self) -> int:
        return self.attention.hidden_size

    @cached_property
    def tensors(self) -> dict[str, Shape]:
        """The shapes of the layer's tensors in a checkpoint, by their names within it."""
        norms = {f"{name}.weight": (self.hidden_size,) for name in self.norms}
        return {**self.attention.tensors(), **self.mlp.tensors(), **norms}

    @cached_property
    def _sglang_names(self) -> dict[str, str]:
        """SGLang's names by Megatron's, of the local and the Transformer Engine layer spec."""
        norms, mlp, attention = self.norms, self.mlp.name, "self_attention."
        return {
            "input_layernorm.weight": norms.before_attention + ".weight",
            f"{attention}linear_qkv.layer_norm_weight": norms.before_attention + ".weight",
            f"{attention}post_norm.weight": norms.after_attention + ".weight",
            "pre_mlp_layernorm.weight": norms.before_mlp + ".weight",
            "mlp.linear_fc1.layer_norm_weight": norms.before_mlp + ".weight",
            "mlp.post_norm.weight": norms.after_mlp + ".weight",
            f"{attention}linear_qkv.weight": "self_attn.qkv_proj.weight",
            f"{attention}linear_qkv.bias": "self_attn.qkv_proj.bias",
            f"{attention}q_layernorm.weight": "self_attn.q_norm.weight",
            f"{attention}k_layernorm.weight": "self_attn.k_norm.weight",
            f"{attention}linear_proj.weight": "self_attn.o_proj.weight",
            f"{attention}core_attention.softmax_offset": "self_attn.sinks",
            "mlp.linear_fc1.weight": f"{mlp}.gate_up_proj.weight",
            "mlp.linear_fc2.weight": f"{mlp}.down_proj.weight",
            "mlp.router.weight": f"{mlp}.gate.weight",
            "mlp.experts.down": f"{mlp}.experts.w2_weight",
            **self._names_of_experts,
        }

    @property
    def _names_of_experts(self) -> dict[str, str]:
        if not isinstance(mlp := self.mlp, Mixture):
            return {}
        shared = f"{mlp.name}.{mlp.shared_name}."
        return {
            "mlp.router.expert_bias": f"{mlp.name}.{mlp.bias_name}",
            "mlp.shared_experts.linear_fc1.weight": f"{shared}gate_up_proj.weight",
            "mlp.shared_experts.linear_fc2.weight": f"{shared}down_proj.weight",
            "mlp.shared_experts.gate_weight": f"{mlp.name}.shared_expert_gate.weight",
        }

    def pieces(self, name: str, shape: Shape, shards: Shards, backend: Backend) -> Pieces:
        """Return what a parameter of the layer consists of, by its name within the layer; nothing where the layer has
        no such parameter. Names of pieces are relative to the layer. Raises ValueError where it cannot be divided."""
        if backend == "megatron":
            name = self._sglang_names.get(name) or name.replace("mlp.", f"{self.mlp.name}.", 1)
        if name.removesuffix(".weight") in set(self.norms):
            return whole(name, (self.hidden_size,))
        block = self.attention if name.startswith("self_attn.") else self.mlp
        return block.pieces(name, shape, shards, backend)

    def held(self, sizes: Sizes) -> Elements:
        """Return how many parameters one rank holds."""
        norms = self.hidden_size * len([*self.norms])
        return Elements(norms).plus(self.attention.held(sizes)).plus(self.mlp.held(sizes))

    def activations(self, sizes: Sizes, recomputes: bool, split_input: int) -> int:
        """Return the numbers per token that one rank keeps for the backward pass: inputs of norms and of linear layers,
        of which it has ``split_input``, and what the blocks keep."""
        inputs = (2 + len([*self.norms])) * split_input
        return inputs + self.attention.activations(sizes, recomputes) + self.mlp.activations(sizes, recomputes)


def within(prefix: str, pieces: Pieces) -> Pieces:
    """Return the pieces of a layer's parameter by the names that they have in the whole model."""
    return tuple(msgspec.structs.replace(piece, name=prefix + piece.name) if piece.name else piece for piece in pieces)
