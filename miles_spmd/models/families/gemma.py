from __future__ import annotations

from typing import Any, ClassVar

from miles_spmd.models.blocks import Attention, Mlp, Norms
from miles_spmd.models.family import Family
from miles_spmd.models.rope import Rope

GELU = "gelu_pytorch_tanh"


class Gemma2(Family):
    """Gemma 2: norms before and after each block, soft-caps, and a window in every second layer."""

    model_type = "gemma2"
    fields: ClassVar[tuple[str, ...]] = (
        "_sliding_window_pattern",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "hidden_activation",
        "query_pre_attn_scalar",
        "sliding_window",
        "sliding_window_pattern",
    )
    required = (*Family.required, "head_dim", "query_pre_attn_scalar", "sliding_window")
    assumed_kv_heads = 4
    ties_by_default = True
    zero_centred_norms = True
    hidden_act = GELU
    attention_kinds = ("full_attention", "sliding_attention")
    norms = Norms(
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    )

    def slides(self, number: int) -> bool:
        """Whether the queries of a layer see the last keys only."""
        return number % 2 == 0

    def attention(self, number: int, **differences: Any) -> Attention:
        c = self.config
        return super().attention(
            number,
            scale=c["query_pre_attn_scalar"] ** -0.5,
            softcap=c.get("attn_logit_softcapping") or 0.0,
            window=c["sliding_window"] if self.slides(number) else 0,
            **differences,
        )

    def mlp(self, number: int) -> Mlp:
        return Mlp(self.config["hidden_size"], self.config["intermediate_size"], "gelu_tanh")

    @property
    def embedding_scale(self) -> float:
        return self.hidden_size**0.5

    @property
    def logit_softcap(self) -> float:
        return self.config.get("final_logit_softcapping") or 0.0

    def engine_config(self) -> dict[str, Any]:
        return {"hidden_act": GELU}


class Gemma3(Gemma2):
    """Gemma 3 (text): queries and keys are normalised; every sixth layer sees everything, with another theta."""

    model_type = "gemma3_text"
    sglang_module = "gemma3_causal"
    sglang_splits_vocabulary = False
    fields = (*Gemma2.fields, "rope_local_base_freq")
    rope_kinds = Gemma2.attention_kinds

    def slides(self, number: int) -> bool:
        kinds = self.config.get("layer_types")
        return kinds[number] == "sliding_attention" if kinds else (number + 1) % self.pattern != 0

    @property
    def pattern(self) -> int:
        return self.config.get("sliding_window_pattern") or self.config.get("_sliding_window_pattern") or 6

    def attention(self, number: int, **differences: Any) -> Attention:
        return super().attention(number, qk_norm="head")

    def rope(self, number: int) -> Rope:
        return Rope.of(self.config, self.config["head_dim"], layer_type=self.attention_kinds[self.slides(number)])

    def engine_config(self) -> dict[str, Any]:
        return {}
