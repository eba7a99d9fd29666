from __future__ import annotations

from typing import Any, ClassVar

from miles_spmd.models.blocks import Attention, Mlp, Norms
from miles_spmd.models.family import Family
from miles_spmd.models.hf_config import malformed_sizes
from miles_spmd.models.rope import Rope

GELU = "gelu_pytorch_tanh"
SLIDING = "sliding_attention"
PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern")  # transformers writes the second and ignores it


class Gemma2(Family):
    """Gemma 2: norms before and after each block, soft-caps, and a window in every second layer."""

    model_type = "gemma2"
    fields: ClassVar[tuple[str, ...]] = (
        *PATTERNS,
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "hidden_activation",
        "query_pre_attn_scalar",
        "sliding_window",
    )
    required = (*Family.required, "head_dim", "query_pre_attn_scalar", "sliding_window")
    assumed_kv_heads = 4
    ties_by_default = True
    zero_centred_norms = True
    hidden_act = GELU
    attention_kinds = ("full_attention", SLIDING)
    norms = Norms(
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    )

    assumed_softcaps: ClassVar[tuple[float, float]] = (50.0, 30.0)  # of scores and logits, where the config lacks them

    def unsupported(self, config: dict[str, Any]) -> list[str]:
        problems = super().unsupported(config)
        if config.get("tie_word_embeddings") is False:
            problems.append("tie_word_embeddings = false is not supported (SGLang multiplies by the embeddings)")
        if malformed_sizes(config):
            return problems
        types, pattern = config.get("layer_types"), self.pattern(config)
        for key in PATTERNS:
            if types is None and config.get(key) not in (None, pattern):
                problems.append(
                    f"{key} = {config[key]} is not read by transformers, which takes {pattern}; name layer_types"
                )
        if types and config.get(PATTERNS[0]) and types != [self.kind(number, pattern) for number in range(len(types))]:
            problems.append(f"{PATTERNS[0]} and layer_types differ; remove the wrong one")
        return problems

    def pattern(self, config: dict[str, Any]) -> int:
        """Return p of a config without ``layer_types``: every p-th layer sees all keys."""
        return 2

    def kind(self, number: int, pattern: int) -> str:
        return self.attention_kinds[(number + 1) % pattern != 0]

    def slides(self, number: int) -> bool:
        """Whether the queries of a layer see the last keys only."""
        types = self.config.get("layer_types")
        return (types[number] if types else self.kind(number, self.pattern(self.config))) == SLIDING

    def attention(self, number: int, **differences: Any) -> Attention:
        c = self.config
        return super().attention(
            number,
            scale=c["query_pre_attn_scalar"] ** -0.5,
            softcap=c.get("attn_logit_softcapping", self.assumed_softcaps[0]) or 0.0,
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
        return self.config.get("final_logit_softcapping", self.assumed_softcaps[1]) or 0.0

    def engine_config(self) -> dict[str, Any]:
        return {"hidden_act": GELU}


class Gemma3(Gemma2):
    """Gemma 3 (text): queries and keys are normalised; every sixth layer sees everything, with another theta."""

    model_type = "gemma3_text"
    sglang_module = "gemma3_causal"
    sglang_splits_vocabulary = False
    fields = (*Gemma2.fields, "rope_local_base_freq")
    rope_kinds = Gemma2.attention_kinds

    assumed_softcaps = (0.0, 0.0)

    def unsupported(self, config: dict[str, Any]) -> list[str]:
        capped = config.get("attn_logit_softcapping") is not None  # transformers' model of this type ignores it
        return super().unsupported(config) + (["attn_logit_softcapping is not supported"] if capped else [])

    def pattern(self, config: dict[str, Any]) -> int:
        return config.get(PATTERNS[0]) or 6

    def attention(self, number: int, **differences: Any) -> Attention:
        return super().attention(number, qk_norm="head")

    def rope(self, number: int) -> Rope:
        return Rope.of(self.config, self.config["head_dim"], layer_type=self.attention_kinds[self.slides(number)])

    def engine_config(self) -> dict[str, Any]:
        return {}
