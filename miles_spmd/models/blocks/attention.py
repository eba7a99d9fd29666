"""Causal attention whose query heads share key-value heads."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from miles_spmd.models.attention import Form
from miles_spmd.models.blocks.block import Backend, Block, Elements, Pieces, Shape, Shard, Shards, Sizes, share
from miles_spmd.models.layout import Span, stack, window
from miles_spmd.models.rope import Rope

Q, K, V = PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Attention(Block):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245)."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    qkv_bias: bool = False
    qk_norm: Literal["", "head", "width"] = ""
    """Queries and keys are normalised: each head by itself, or all heads of a token together."""
    scale: float = 0.0
    """What scores are multiplied by; 0: 1 / sqrt(head_dim)."""
    window: int = 0
    """Number of most recent keys that a query sees, itself included; 0: all."""
    softcap: float = 0.0
    """Scores s become softcap * tanh(s / softcap); 0: they stay."""
    sinks: bool = False
    """A learnable logit of each head joins the softmax and has no value."""
    fused: bool = False
    """The checkpoint has one matrix ``qkv_proj`` in place of three."""

    @property
    def score_scale(self) -> float:
        return self.scale or self.head_dim**-0.5

    @property
    def form(self) -> Form:
        return Form(self.window, self.softcap)

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def tensors(self) -> dict[str, Shape]:
        tensors: dict[str, Shape] = {}
        rows = {Q: self.q_width, K: self.kv_width, V: self.kv_width}
        if self.fused:
            rows = {"qkv_proj": self.q_width + 2 * self.kv_width}
        for name, size in rows.items():
            tensors[f"self_attn.{name}.weight"] = (size, self.hidden_size)
            if self.qkv_bias:
                tensors[f"self_attn.{name}.bias"] = (size,)
        if self.qk_norm:
            wide = self.qk_norm == "width"
            tensors["self_attn.q_norm.weight"] = (self.q_width if wide else self.head_dim,)
            tensors["self_attn.k_norm.weight"] = (self.kv_width if wide else self.head_dim,)
        if self.sinks:
            tensors["self_attn.sinks"] = (self.num_heads,)
        tensors["self_attn.o_proj.weight"] = (self.hidden_size, self.q_width)
        return tensors

    def pieces(self, name: str, shape: Shape, shards: Shards, backend: Backend) -> Pieces:
        match name:
            case "self_attn.qkv_proj.weight" | "self_attn.qkv_proj.bias":
                spans = self._interleaved(shards.tp) if backend == "megatron" else self._stacked(shards.tp)
                leaf = name.rpartition(".")[2]
                placed = [self._in_checkpoint(span, leaf) for span in spans]
                if any(tensor not in self.tensors() for tensor, *_ in placed):
                    return ()
                return stack(placed, (self.hidden_size,) if leaf == "weight" else ())
            case "self_attn.o_proj.weight":
                return self.column_shard(name, shards.tp)
            case "self_attn.sinks" if self.sinks:
                return stack(share(name, self.num_heads, shards.tp), ())
        return self.whole(name)

    def _interleaved(self, tp: Shard) -> list[Span]:
        """Megatron: for each query group its query heads, its key head, its value head; each rank has an equal share of
        these rows, which may start in the middle of a group."""
        spans: list[Span] = []
        q_rows = self.num_heads // self.num_kv_heads * self.head_dim
        for group in range(self.num_kv_heads):
            for name, rows in ((Q, q_rows), (K, self.head_dim), (V, self.head_dim)):
                spans.append((name, group * rows, (group + 1) * rows))
        return window(spans, *tp.part(self.q_width + 2 * self.kv_width, "self_attn.q/k/v_proj"))

    def _stacked(self, tp: Shard) -> list[Span]:
        """SGLang: this rank's query heads, key heads, value heads. With more ranks than key-value heads, several ranks
        have copies of the same one."""
        replicas = max(1, tp.size // self.num_kv_heads)
        kv = Shard(tp.rank // replicas, tp.size // replicas)
        spans: list[Span] = []
        for name, heads, shard in ((Q, self.num_heads, tp), (K, self.num_kv_heads, kv), (V, self.num_kv_heads, kv)):
            start, stop = shard.part(heads, f"heads of self_attn.{name}")
            spans.append((name, start * self.head_dim, stop * self.head_dim))
        return spans

    def _in_checkpoint(self, span: Span, leaf: str) -> Span:
        name, start, stop = span
        if not self.fused:
            return f"self_attn.{name}.{leaf}", start, stop
        first = {Q: 0, K: self.q_width, V: self.q_width + self.kv_width}[name]
        return f"self_attn.qkv_proj.{leaf}", first + start, first + stop

    def held(self, sizes: Sizes) -> Elements:
        # SGLang repeats key-value heads where there are fewer than ranks
        kv_ranks = min(sizes.tp, self.num_kv_heads) if sizes.engine else sizes.tp
        each = self.hidden_size + self.qkv_bias
        projections = each * self.q_width // sizes.tp + 2 * each * self.kv_width // kv_ranks
        norms = sum(prod(shape) for name, shape in self.tensors().items() if "_norm." in name)
        sinks = self.num_heads // sizes.tp if self.sinks else 0
        return Elements(projections + self.hidden_size * self.q_width // sizes.tp + norms + sinks)

    def activations(self, sizes: Sizes, recomputes: bool) -> int:
        """Of q, k, v and the attention's output; before a norm of q and k also the product that has them and v in one,
        with a copy of q."""
        return (2 * self.q_width + 2 * self.kv_width) * (2 if self.qk_norm else 1) // sizes.tp

    def cached(self, tp: int) -> int:
        """Return the numbers that one of ``tp`` ranks of an engine keeps per token."""
        return 2 * max(1, self.num_kv_heads // tp) * self.head_dim

    def score_flops(self, tokens: int) -> float:
        """Return the FLOPs of the two products with a sequence's scores in a forward pass."""
        seen = min(self.window or tokens, tokens)
        pairs = seen * tokens - seen * seen / 2  # half of the matrix without a window, as is usual
        return 4.0 * self.q_width * pairs
