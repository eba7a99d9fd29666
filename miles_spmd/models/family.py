"""A model family: from the config.json of a Hugging Face checkpoint to the models of Megatron-core and SGLang.

A family is one short file that says which blocks its layers have and which fields of config.json decide it. Everything
else follows from the blocks. The base class is a pre-norm decoder with grouped-query attention and a gated MLP.
Megatron names follow megatron-core 0.19.2 (local and Transformer-Engine layer specs), SGLang names follow 0.5.16.
"""

from __future__ import annotations

import re
from functools import cached_property
from math import prod
from typing import Any, ClassVar

from miles_spmd.models.blocks import (
    Attention,
    Elements,
    Layer,
    Mixture,
    Mlp,
    Norms,
    Pieces,
    Shape,
    Shard,
    Shards,
    Sizes,
    within,
)
from miles_spmd.models.blocks.block import Backend, share
from miles_spmd.models.hf_config import (
    head_dim,
    malformed_sizes,
    rope_parameters,
    unknown_fields,
)
from miles_spmd.models.layout import filled_shape, stack, whole
from miles_spmd.models.rope import Rope, rope_problems

MEGATRON_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
SGLANG_LAYER = re.compile(r"model\.layers\.(\d+)\.")

# Outside the layers: Megatron's names, and SGLang's for the same, which are the checkpoint's.
EMBEDDING, HEAD, FINAL_NORM, VALUE_HEAD = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.norm.weight",
    "score.weight",
)
MEGATRON_NAMES = {
    "embedding.word_embeddings.weight": EMBEDDING,
    "output_layer.weight": HEAD,
    "decoder.final_layernorm.weight": FINAL_NORM,
}


class Family:
    """One model, described by its ``config.json``. Sizes are those of the whole model, for every parallel layout.

    With ``value_head`` it is a critic or a reward model: the same backbone with one output in place of the vocabulary,
    ``score.weight`` [1, hidden] by the name of transformers' sequence classifiers.

    Raises ValueError listing everything in the config that is missing, unknown, or not supported by trainer or engine.
    """

    model_type: ClassVar[str]
    fields: ClassVar[tuple[str, ...]] = ()
    """The fields of config.json that the family reads beside those of every family."""
    assumed_kv_heads: ClassVar[int] = 32  # where the config lacks their number; 0: as many as query heads
    required: ClassVar[tuple[str, ...]] = (
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "rms_norm_eps",
        "vocab_size",
    )
    zero_centred_norms: ClassVar[bool] = False
    """Norms multiply by 1 + weight."""

    def __init__(self, config: dict[str, Any], *, value_head: bool = False) -> None:
        problems = [f"{key} is missing" for key in self.required if config.get(key) is None]
        problems += malformed_sizes(config) + unknown_fields(config, self.fields) + self.unsupported(config)
        if problems:
            raise ValueError(f"config.json of this {self.model_type} model: " + "; ".join(problems))
        self.config = config
        self.hidden_size: int = config["hidden_size"]
        self.num_layers: int = config["num_hidden_layers"]
        self.vocab_size: int = config["vocab_size"]
        self.value_head = value_head
        self.tied_embeddings: bool = config.get("tie_word_embeddings", self.ties_by_default) and not value_head
        try:
            self.layers: tuple[Layer, ...] = tuple(self.layer(number) for number in range(self.num_layers))
        except ValueError as error:  # of a block
            raise ValueError(f"config.json of this {self.model_type} model: {error}") from None
        ropes = (layer.attention.rope for layer in self.layers)
        exact = [rope.exact_length for rope in ropes if rope and rope.exact_length]
        self.max_sequence_length: int = min([config["max_position_embeddings"], *exact])

    # ---- what a family decides ----

    hidden_act: ClassVar[str] = "silu"
    has_attention_bias: ClassVar[bool] = False
    attention_kinds: ClassVar[tuple[str, ...]] = ("full_attention",)
    partial_rotary: ClassVar[bool] = False
    interleaved_rotary: ClassVar[bool] = False
    rope_kinds: ClassVar[tuple[str, ...]] = ("",)
    """The types of layers that have rotary positions of their own."""
    ties_by_default: ClassVar[bool] = False
    sglang_splits_vocabulary: ClassVar[bool] = True
    """False: each rank of an engine has the whole embedding."""
    sglang_module: ClassVar[str] = ""
    """The file of SGLang that has the model's class; "": it is named as the model type."""

    def layer(self, number: int) -> Layer:
        """Return the blocks of the layer with this number."""
        return Layer(self.attention(number), self.mlp(number), self.norms)

    def attention(self, number: int, **differences: Any) -> Attention:
        c = self.config
        heads = c["num_attention_heads"]
        sizes = c["hidden_size"], heads, c.get("num_key_value_heads") or heads, head_dim(c)
        return Attention(*sizes, self.rope(number), **differences)

    def rope(self, number: int) -> Rope | None:
        """Return the rotary positions of the layer with this number; None: it has none."""
        return Rope.of(self.config, head_dim(self.config), interleaved=self.interleaved_rotary)

    def mlp(self, number: int) -> Mlp | Mixture:
        return Mlp(self.config["hidden_size"], self.config["intermediate_size"])

    norms: ClassVar[Norms] = Norms()

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by before the first layer."""
        return 1.0

    @property
    def logit_softcap(self) -> float:
        """Logits l become softcap * tanh(l / softcap); 0: they stay."""
        return 0.0

    # ---- from the config ----

    def unsupported(self, config: dict[str, Any]) -> list[str]:
        """Return messages about all settings of the config that trainer or engine does not support."""
        problems = []
        for key in ("hidden_act", "hidden_activation"):
            if config.get(key) not in (None, self.hidden_act):
                problems.append(f"{key} {config[key]!r} is not supported (only {self.hidden_act})")
        biases = () if self.has_attention_bias else ("attention_bias",)
        for key in (*biases, "mlp_bias", "dual_chunk_attention_config", "use_bidirectional_attention"):
            if config.get(key):
                problems.append(f"{key} is not supported")
        types = config.get("layer_types")
        kinds = {str(name) for name in types} - set(self.attention_kinds) if isinstance(types, list) else set()
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
        problems = []
        for kind in self.rope_kinds:
            found = rope_problems(config, 0 if malformed_sizes(config) else head_dim(config), layer_type=kind)
            partial = not found and rope_parameters(config, kind)["partial_rotary_factor"] != 1
            if partial and not self.partial_rotary:  # transformers' model of this type ignores it
                found.append("partial_rotary_factor is not supported")
            problems += [problem for problem in found if problem not in problems]
        return problems

    def transformer_config(self) -> dict[str, Any]:
        """Return the keyword arguments of megatron-core's TransformerConfig that follow from the model.

        ``activation_func`` is the name of a function in torch.nn.functional, because this room imports no torch.
        Layers of several kinds differ in what their modules read from their blocks; these arguments are those of the
        first layer, or of the first that has experts.
        """
        attention = self.layers[0].attention
        mixture = next((layer.mlp for layer in self.layers if isinstance(layer.mlp, Mixture)), None)
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.config["intermediate_size"],
            "num_attention_heads": attention.num_heads,
            "num_query_groups": attention.num_kv_heads,
            "kv_channels": attention.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": self.config["rms_norm_eps"],
            "layernorm_zero_centered_gamma": self.zero_centred_norms,
            "qk_layernorm": bool(attention.qk_norm),
            "gated_linear_unit": True,
            "activation_func": "silu",
            "add_bias_linear": False,
            "add_qkv_bias": attention.qkv_bias,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            **(_routing(mixture) if mixture else {}),
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

    def engine_config(self) -> dict[str, Any]:
        """Return the fields that SGLang reads in config.json and that transformers does not write."""
        return {}

    # ---- what the model consists of ----

    def checkpoint_tensors(self) -> dict[str, Shape]:
        """Return the shapes of all tensors of the checkpoint on disk by name; tied embeddings have no ``lm_head``."""
        return self._tensors

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor that checkpoints may have beside :meth:`checkpoint_tensors` has no effect on the model: a
        policy's output layer under a value head, or the copy of tied embeddings; buffers of older checkpoints."""
        without_head = self.tied_embeddings or self.value_head
        return (name == HEAD and without_head) or name.endswith(".rotary_emb.inv_freq")

    @cached_property
    def _tensors(self) -> dict[str, Shape]:
        tensors = dict(self.outside)
        for number, layer in enumerate(self.layers):
            tensors |= {f"model.layers.{number}.{name}": shape for name, shape in layer.tensors.items()}
        return tensors

    @property
    def outside(self) -> dict[str, Shape]:
        """The shapes of the checkpoint's tensors that belong to no layer, by name."""
        tensors: dict[str, Shape] = {EMBEDDING: (self.vocab_size, self.hidden_size), FINAL_NORM: (self.hidden_size,)}
        if self.value_head:
            tensors[VALUE_HEAD] = (1, self.hidden_size)
        elif not self.tied_embeddings:
            tensors[HEAD] = (self.vocab_size, self.hidden_size)
        return tensors

    def num_parameters(self) -> int:
        return sum(map(prod, self._tensors.values()))

    def num_active_parameters(self) -> int:
        """Return the number of parameters that one token's forward pass uses: all but the experts that it is not routed
        to."""
        return self.num_parameters() - sum(layer.mlp.unused for layer in self.layers)

    def held(self, sizes: Sizes) -> list[Elements]:
        """Return how many parameters of each layer one rank holds."""
        return [layer.held(sizes) for layer in self.layers]

    def flops(self, tokens: int) -> float:
        """Return the FLOPs of forward and backward pass of one sequence without recomputation: 6 per token and active
        parameter, and the products with attention's scores three times."""
        embedding = 0 if self.tied_embeddings else self.vocab_size * self.hidden_size  # a lookup, not a product
        scores = sum(layer.attention.score_flops(tokens) for layer in self.layers)
        return 6.0 * (self.num_active_parameters() - embedding) * tokens + 3 * scores

    def cached(self, tp: int) -> int:
        """Return the numbers that one of ``tp`` ranks of an engine keeps per token."""
        return sum(layer.attention.cached(tp) for layer in self.layers)

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
        shards = Shards(Shard(tp_rank, tp_size), Shard(etp_rank, etp_size), Shard(ep_rank, ep_size))
        return self._pieces(name, shape, shards, "megatron")

    def sglang_layout(self, name: str, shape: Shape, tp_rank: int, tp_size: int) -> Pieces:
        """Return the pieces of the SGLang parameter ``name`` on this rank of the engine. Raises ValueError as
        :meth:`megatron_layout` does."""
        tp = Shard(tp_rank, tp_size)
        return self._pieces(name, shape, Shards(tp, tp, Shard(0, 1)), "sglang")

    def _pieces(self, name: str, shape: Shape, shards: Shards, backend: Backend) -> Pieces:
        layer = (MEGATRON_LAYER if backend == "megatron" else SGLANG_LAYER).match(name)
        title = {"megatron": "Megatron", "sglang": "SGLang"}[backend]
        if layer is None:
            splits = backend == "megatron" or self.sglang_splits_vocabulary
            pieces = self._outside(MEGATRON_NAMES.get(name, name), shape, shards.tp if splits else Shard(0, 1))
        elif (number := int(layer[1])) < self.num_layers:
            pieces = self.layers[number].pieces(name[layer.end() :], shape, shards, backend)
            pieces = within(f"model.layers.{number}.", pieces)
        else:
            pieces = ()
        if not pieces:
            raise ValueError(f"{title} parameter {name} has no counterpart in a {self.model_type} checkpoint")
        if filled_shape(pieces) != tuple(shape):
            raise ValueError(
                f"{title} parameter {name} has shape {tuple(shape)} on tensor-parallel rank {shards.tp.rank} of "
                f"{shards.tp.size}; this {self.model_type} model needs {filled_shape(pieces)}"
            )
        return pieces

    def _outside(self, name: str, shape: Shape, tp: Shard) -> Pieces:
        """Return the pieces of a parameter that belongs to no layer."""
        name = VALUE_HEAD if name == HEAD and self.value_head else name
        name = EMBEDDING if name == HEAD and self.tied_embeddings else name
        if name not in (EMBEDDING, HEAD):
            return (
                whole(name, self._tensors[name]) if name in (FINAL_NORM, VALUE_HEAD) and name in self._tensors else ()
            )
        # In both backends each rank has an equal share of the padded rows, with padding at the end.
        if shape[0] * tp.size < self.vocab_size:
            raise ValueError(f"{tp.size} times {shape[0]} rows are too few for a vocabulary of {self.vocab_size}")
        return stack(share(name, self.vocab_size, tp, shape[0] * tp.size), (self.hidden_size,))


def _routing(mixture: Mixture) -> dict[str, Any]:
    """Return the keyword arguments of TransformerConfig that follow from a layer of experts."""
    return {
        "num_moe_experts": mixture.num_experts,
        "moe_ffn_hidden_size": mixture.ffn_size,
        "moe_router_topk": mixture.router.per_token,
        "moe_router_score_function": "softmax",  # as far as Megatron is concerned
        "moe_router_pre_softmax": mixture.router.softmax_first,
        "moe_shared_expert_intermediate_size": mixture.shared_size or None,
        "moe_shared_expert_gate": mixture.shared_gate,
        "moe_router_load_balancing_type": "none",
    }
