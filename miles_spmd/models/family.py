"""A model family: from the config.json of a Hugging Face checkpoint to the models of Megatron-core and SGLang.

The base class is the dense pre-norm decoder with grouped-query attention, SwiGLU and rotary positions; a family is one
short file with the differences. Megatron names follow megatron-core 0.19.2 (local and Transformer-Engine layer specs),
SGLang names follow 0.5.16.
"""

from __future__ import annotations

import re
from functools import cached_property
from math import prod
from typing import Any, ClassVar, NamedTuple

from miles_spmd.models.hf_config import (
    head_dim,
    malformed_sizes,
    rope_parameters,
)
from miles_spmd.models.layout import PADDING, Piece, Span, beside, filled_shape, stack, whole, window
from miles_spmd.models.rope import Rope, rope_problems

Shape = tuple[int, ...]
Pieces = tuple[Piece, ...]

MEGATRON_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
SGLANG_LAYER = re.compile(r"model\.layers\.(\d+)\.")

# Megatron's names, of the local and the Transformer Engine layer spec, and SGLang's for the same; without the layer.
MEGATRON_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.weight": "self_attn.qkv_proj.weight",
    "self_attention.linear_qkv.bias": "self_attn.qkv_proj.bias",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.weight": "mlp.gate_up_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.experts.down": "mlp.experts.w2_weight",
}

VALUE_HEAD = "score.weight"


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


class Family:
    """One model, described by its ``config.json``. Sizes are those of the whole model, for every parallel layout.

    With ``value_head`` it is a critic or a reward model: the same backbone with one output in place of the vocabulary,
    ``score.weight`` [1, hidden] by the name of transformers' sequence classifiers.

    Raises ValueError listing everything in the config that is missing or that trainer or engine does not support.
    """

    model_type: ClassVar[str]
    qk_norm: ClassVar[bool] = False
    qkv_bias: ClassVar[bool] = False
    assumed_kv_heads: ClassVar[int] = 32  # where the config lacks their number; 0: as many as query heads
    # of a dense model
    num_experts = 0
    experts_per_token = 0
    expert_ffn_size = 0
    required: ClassVar[tuple[str, ...]] = (
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "rms_norm_eps",
        "vocab_size",
    )

    def __init__(self, config: dict[str, Any], *, value_head: bool = False) -> None:
        problems = [f"{key} is missing" for key in self.required if config.get(key) is None]
        problems += malformed_sizes(config) + self.unsupported(config)
        if problems:
            raise ValueError(f"config.json of this {self.model_type} model: " + "; ".join(problems))
        self.config = config
        self.hidden_size: int = config["hidden_size"]
        self.num_layers: int = config["num_hidden_layers"]
        self.num_heads: int = config["num_attention_heads"]
        self.num_kv_heads: int = config.get("num_key_value_heads") or self.num_heads
        self.head_dim: int = head_dim(config)
        self.ffn_size: int = config["intermediate_size"]
        self.vocab_size: int = config["vocab_size"]
        self._rope = Rope.of(config, self.head_dim)
        longest: int = config["max_position_embeddings"]
        self.max_sequence_length = min(longest, self._rope.exact_length or longest)
        self.value_head = value_head
        self.tied_embeddings: bool = config.get("tie_word_embeddings", False) and not value_head

    # ---- from the config ----

    def unsupported(self, config: dict[str, Any]) -> list[str]:
        """Return messages about all settings of the config that trainer or engine does not support."""
        problems = []
        if config.get("hidden_act", "silu") != "silu":
            problems.append(f"hidden_act {config['hidden_act']!r} is not supported (only silu)")
        for key in ("attention_bias", "mlp_bias", "dual_chunk_attention_config"):
            if config.get(key):
                problems.append(f"{key} is not supported")
        kinds = set(config.get("layer_types") or ()) - {"full_attention"}
        if config.get("use_sliding_window") or kinds:
            named = f" ({', '.join(sorted(kinds))})" if kinds else ""
            problems.append(f"sliding-window attention is not supported{named}")
        if self.assumed_kv_heads and "num_key_value_heads" not in config:
            problems.append(f"num_key_value_heads is missing, for which transformers takes {self.assumed_kv_heads}")
        if config.get("quantization_config"):
            problems.append("quantized checkpoints are not supported; start from the unquantized one")
        return problems + self.unsupported_rope(config)

    def unsupported_rope(self, config: dict[str, Any]) -> list[str]:
        """Return messages about rotary positions, as :meth:`unsupported`."""
        problems = rope_problems(config, 0 if malformed_sizes(config) else head_dim(config))
        if not problems and rope_parameters(config)["partial_rotary_factor"] != 1:
            problems.append("partial_rotary_factor is not supported")  # transformers' model of this type has none
        return problems

    def rope(self, layer: int) -> Rope | None:
        """Return the rotary positions of a layer, counted in the whole model from 0; None: it has none."""
        return self._rope

    def transformer_config(self) -> dict[str, Any]:
        """Return the keyword arguments of megatron-core's TransformerConfig that follow from the model.

        ``activation_func`` is the name of a function in torch.nn.functional, because this room imports no torch.
        """
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_size,
            "num_attention_heads": self.num_heads,
            "num_query_groups": self.num_kv_heads,
            "kv_channels": self.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": self.config["rms_norm_eps"],
            "qk_layernorm": self.qk_norm,
            "gated_linear_unit": True,
            "activation_func": "silu",
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }

    def gpt_model(self, tp_size: int = 1) -> dict[str, Any]:
        """Return the keyword arguments of megatron-core's GPTModel that follow from the model.

        ``vocab_size`` is rounded up to a multiple of ``tp_size``. The added rows of embedding and output layer are
        zero; every softmax must exclude the logits of ids >= ``self.vocab_size``, which are not tokens.
        """
        return {
            "vocab_size": -(-self.vocab_size // tp_size) * tp_size,
            "max_sequence_length": self.max_sequence_length,
            "share_embeddings_and_output_weights": self.tied_embeddings,
            "position_embedding_type": "none",  # rotary positions are those of :meth:`rope`
        }

    def checkpoint_tensors(self) -> dict[str, Shape]:
        """Return the shapes of all tensors of the checkpoint on disk by name; tied embeddings have no ``lm_head``."""
        return self._tensors

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor that checkpoints may have beside :meth:`checkpoint_tensors` has no effect on the model: a
        policy's output layer under a value head, or the copy of tied embeddings; buffers of older checkpoints."""
        without_head = self.tied_embeddings or self.value_head
        return (name == "lm_head.weight" and without_head) or name.endswith(".rotary_emb.inv_freq")

    def num_parameters(self) -> int:
        return sum(map(prod, self._tensors.values()))

    def num_active_parameters(self) -> int:
        """Return the number of parameters that one token's forward pass uses: all but the experts that it is not routed
        to."""
        unused = self.num_layers * (self.num_experts - self.experts_per_token)
        expert = swiglu_tensors("", self.hidden_size, self.expert_ffn_size)
        return self.num_parameters() - unused * sum(map(prod, expert.values()))

    @cached_property
    def _tensors(self) -> dict[str, Shape]:
        tensors: dict[str, Shape] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        q_rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            attention = prefix + "self_attn."
            tensors[prefix + "input_layernorm.weight"] = (self.hidden_size,)
            for name, rows in (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
                tensors[f"{attention}{name}.weight"] = (rows, self.hidden_size)
                if self.qkv_bias:
                    tensors[f"{attention}{name}.bias"] = (rows,)
            if self.qk_norm:
                tensors[attention + "q_norm.weight"] = (self.head_dim,)
                tensors[attention + "k_norm.weight"] = (self.head_dim,)
            tensors[attention + "o_proj.weight"] = (self.hidden_size, q_rows)
            tensors[prefix + "post_attention_layernorm.weight"] = (self.hidden_size,)
            tensors.update(self._mlp_tensors(prefix + "mlp."))
        tensors["model.norm.weight"] = (self.hidden_size,)
        if self.value_head:
            tensors[VALUE_HEAD] = (1, self.hidden_size)
        elif not self.tied_embeddings:
            tensors["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return tensors

    def _mlp_tensors(self, prefix: str) -> dict[str, Shape]:
        return swiglu_tensors(prefix, self.hidden_size, self.ffn_size)

    # ---- layouts ----

    def megatron_layout(
        self,
        name: str,
        shape: Shape,
        *,
        tp_rank: int,
        tp_size: int,
        etp_rank: int = 0,
        etp_size: int = 1,
        ep_rank: int = 0,
        ep_size: int = 1,
    ) -> Pieces:
        """Return the pieces of the Megatron parameter ``name``, whose layer number counts in the whole model.

        ``shape`` is the local shape; ``tp`` is tensor parallelism, ``etp`` that of experts, ``ep`` expert parallelism.
        Raises ValueError when the family has no such parameter or the parameter has another shape on this rank.
        """
        layer = MEGATRON_LAYER.match(name)
        prefix, leaf = (f"model.layers.{layer[1]}.", name[layer.end() :]) if layer else ("", name)
        shards = Shards(Shard(tp_rank, tp_size), Shard(etp_rank, etp_size), Shard(ep_rank, ep_size))
        own_name = prefix + MEGATRON_NAMES.get(leaf, leaf)
        return self._checked("Megatron", name, shape, shards, self._pieces(own_name, shape, shards, interleaved=True))

    def sglang_layout(self, name: str, shape: Shape, tp_rank: int, tp_size: int) -> Pieces:
        """Return the pieces of the SGLang parameter ``name`` on this rank of the engine. Raises ValueError as
        :meth:`megatron_layout` does."""
        tp, alone = Shard(tp_rank, tp_size), Shard(0, 1)
        # SGLang's ep_size is 1 or tp_size; experts are whole in the second case
        apart = ".experts." in name and shape[0] < self.num_experts
        shards = Shards(tp, alone, tp) if apart else Shards(tp, tp, alone)
        return self._checked("SGLang", name, shape, shards, self._pieces(name, shape, shards, interleaved=False))

    def _checked(self, backend: str, name: str, shape: Shape, shards: Shards, pieces: Pieces) -> Pieces:
        if not pieces or any(piece.name and piece.name not in self._tensors for piece in pieces):
            raise ValueError(f"{backend} parameter {name} has no counterpart in a {self.model_type} checkpoint")
        if filled_shape(pieces) != tuple(shape):
            raise ValueError(
                f"{backend} parameter {name} has shape {tuple(shape)} on tensor-parallel rank {shards.tp.rank} of "
                f"{shards.tp.size}; this {self.model_type} model needs {filled_shape(pieces)}"
            )
        return pieces

    def _pieces(self, name: str, shape: Shape, shards: Shards, *, interleaved: bool) -> Pieces:
        """Return the pieces of a parameter by its SGLang name, which is the checkpoint's where nothing is fused."""
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return self._vocabulary(name, shape, shards.tp)
        layer = SGLANG_LAYER.match(name)
        if layer is None or int(layer[1]) >= self.num_layers:
            return self._whole(name)
        prefix, leaf = layer[0], name[layer.end() :]
        match leaf:
            case "self_attn.qkv_proj.weight" | "self_attn.qkv_proj.bias":
                fused = self._interleaved_qkv if interleaved else self._stacked_qkv
                return fused(prefix + "self_attn.", leaf.rpartition(".")[2], shards.tp)
            case "self_attn.o_proj.weight":
                return self._column_shard(name, shards.tp)
        if leaf.startswith("mlp."):
            return self._mlp(prefix + "mlp.", leaf.removeprefix("mlp."), shape, shards)
        return self._whole(name)  # norms

    def _mlp(self, prefix: str, name: str, shape: Shape, shards: Shards) -> Pieces:
        tp = shards.tp
        match name:
            case "gate_up_proj.weight":
                return self._gate_up(prefix, tp, padded_width(self.ffn_size, shape[0] // 2, tp, tp))
            case "down_proj.weight":
                return self._column_shard(prefix + name, tp, padded_width(self.ffn_size, shape[1], tp, tp))
        return ()

    # ---- how the backends shard, fuse and pad ----

    def _whole(self, name: str) -> Pieces:
        shape = self._tensors.get(name)
        return whole(name, shape) if shape else ()

    def _column_shard(self, name: str, tp: Shard, padded: int = 0, lead: tuple[int, ...] = ()) -> Pieces:
        """This rank's share of the columns of a matrix, of which there are ``padded`` with padding."""
        rows, width = self._tensors[name]
        return beside(share(name, width, tp, padded), rows, lead)

    def _vocabulary(self, name: str, shape: Shape, tp: Shard) -> Pieces:
        """In both backends each rank has an equal share of the padded rows, with padding at the end."""
        if name == "lm_head.weight" and self.value_head:
            return self._whole(VALUE_HEAD)
        name = "model.embed_tokens.weight" if self.tied_embeddings else name
        if shape[0] * tp.size < self.vocab_size:
            raise ValueError(f"{tp.size} times {shape[0]} rows are too few for a vocabulary of {self.vocab_size}")
        return stack(share(name, self.vocab_size, tp, shape[0] * tp.size), (self.hidden_size,))

    def _interleaved_qkv(self, prefix: str, leaf: str, tp: Shard) -> Pieces:
        """Megatron: for each query group its query heads, its key head, its value head; each rank has an equal share of
        these rows, which may start in the middle of a group."""
        spans: list[Span] = []
        q_rows = self.num_heads // self.num_kv_heads * self.head_dim
        for group in range(self.num_kv_heads):
            for name, rows in (("q_proj", q_rows), ("k_proj", self.head_dim), ("v_proj", self.head_dim)):
                spans.append((f"{prefix}{name}.{leaf}", group * rows, (group + 1) * rows))
        total = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return stack(window(spans, *tp.part(total, f"{prefix}q/k/v_proj")), self._row_shape(leaf))

    def _stacked_qkv(self, prefix: str, leaf: str, tp: Shard) -> Pieces:
        """SGLang: this rank's query heads, key heads, value heads. With more ranks than key-value heads, several ranks
        have copies of the same one."""
        replicas = max(1, tp.size // self.num_kv_heads)
        kv = Shard(tp.rank // replicas, tp.size // replicas)
        spans: list[Span] = []
        for name, heads, shard in (
            ("q_proj", self.num_heads, tp),
            ("k_proj", self.num_kv_heads, kv),
            ("v_proj", self.num_kv_heads, kv),
        ):
            start, stop = shard.part(heads, f"heads of {prefix}{name}")
            spans.append((f"{prefix}{name}.{leaf}", start * self.head_dim, stop * self.head_dim))
        return stack(spans, self._row_shape(leaf))

    def _gate_up(self, prefix: str, tp: Shard, padded: int = 0, lead: tuple[int, ...] = ()) -> Pieces:
        """This rank's rows of the gate projection, then those of the up projection."""
        gate, up = prefix + "gate_proj.weight", prefix + "up_proj.weight"
        rows, _ = self._tensors[gate]
        return stack([*share(gate, rows, tp, padded), *share(up, rows, tp, padded)], (self.hidden_size,), lead)

    def _row_shape(self, leaf: str) -> Shape:
        return (self.hidden_size,) if leaf == "weight" else ()


def share(name: str, size: int, tp: Shard, padded: int = 0) -> list[Span]:
    """Return this rank's share of the ``size`` rows (or columns) of a tensor, of which there are ``padded`` with
    padding."""
    padded = padded or size
    return window([(name, 0, size), (PADDING, 0, padded - size)], *tp.part(padded, name))


def padded_width(ffn_size: int, local: int, split: Shard, tp: Shard) -> int:
    """Return the width of an MLP that is split into parts of the width ``local``: without a GPU, SGLang rounds it up to
    a multiple of 32 per rank of the engine, also where experts are whole."""
    rounded = -(-ffn_size // (32 * tp.size)) * 32 * tp.size
    return rounded if local * split.size == rounded else ffn_size


def swiglu_tensors(prefix: str, hidden_size: int, ffn_size: int) -> dict[str, Shape]:
    return {
        prefix + "gate_proj.weight": (ffn_size, hidden_size),
        prefix + "up_proj.weight": (ffn_size, hidden_size),
        prefix + "down_proj.weight": (hidden_size, ffn_size),
    }
