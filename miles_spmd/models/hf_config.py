"""The one reader of what a Hugging Face config.json can spell in several ways.

Where transformers accepts two spellings its precedence holds, because the engine's model is configured by transformers.
Where both are there and differ, a reader that prefers the other one would build another model: that is an error.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

# The first spelling wins in transformers.
SPELLINGS = (("num_local_experts", "num_experts"), ("dtype", "torch_dtype"))
ROPE_SPELLINGS = "rope_scaling", "rope_parameters"
DEFAULT_THETA = 10000.0
DEFAULT_END = {"llama": 2}  # eos_token_id of a config that does not name it, by model_type

# Read by every family, or refused by it.
_READ = """
    architectures attention_bias bos_token_id dtype dual_chunk_attention_config eos_token_id head_dim hidden_act
    hidden_size initializer_range intermediate_size layer_types max_position_embeddings mlp_bias model_type
    num_attention_heads num_hidden_layers num_key_value_heads pad_token_id partial_rotary_factor quantization_config
    rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings torch_dtype use_bidirectional_attention
    use_sliding_window vocab_size
"""
# What transformers or a tool has written beside the model, and what concerns neither weights nor the forward pass:
# settings of generation, of outputs, of a head of another kind, of pre-training.
_NEUTRAL = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention
    attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cls_token_id cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
    embd_pdrop encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id hidden_dropout id2label is_decoder is_encoder_decoder label2id length_penalty max_length
    min_length no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_router_logits output_scores prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate router_aux_loss_coef
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torchscript transformers_version typical_p unk_token_id unsloth_fixed
    unsloth_version use_bfloat16 use_cache
"""
KNOWN = frozenset(_READ.split() + _NEUTRAL.split())

SIZES = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)


def unknown_fields(config: dict[str, Any], fields: Collection[str]) -> list[str]:
    """Return a message about what a config has beside ``fields`` and what every family reads. A field that is null or
    false asks for nothing."""
    known = KNOWN | set(fields)
    unknown = sorted(name for name, value in config.items() if name not in known and value not in (None, False))
    if not unknown:
        return []
    return [
        f"{', '.join(unknown)} {'is' if len(unknown) == 1 else 'are'} not known, and might change the model: remove "
        "what does not, or add a family (docs/models.md)"
    ]


def malformed_sizes(config: dict[str, Any]) -> list[str]:
    """Return messages about sizes that no model can have; which of them a model needs is not known here."""
    sizes = {key: config[key] for key in SIZES if config.get(key) is not None}
    problems = [
        f"{key} must be a positive integer, not {value!r}"
        for key, value in sizes.items()
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0
    ]
    if (eps := config.get("rms_norm_eps")) is not None and not is_positive(eps):
        problems.append(f"rms_norm_eps must be a positive number, not {eps!r}")
    if not isinstance(tied := config.get("tie_word_embeddings", False), bool):
        problems.append(f"tie_word_embeddings must be true or false, not {tied!r}")
    if problems:
        return problems
    heads, experts = sizes.get("num_attention_heads", 1), count_experts(config)
    if heads % (kv_heads := sizes.get("num_key_value_heads", 1)):
        problems.append(f"num_attention_heads = {heads} is not divisible by num_key_value_heads = {kv_heads}")
    if "head_dim" not in sizes and (hidden := sizes.get("hidden_size", heads)) % heads:
        problems.append(f"hidden_size = {hidden} is not divisible by num_attention_heads = {heads}")
    if (width := head_dim(config)) % 2:
        problems.append(f"head_dim = {width} is odd, which rotary positions do not allow")
    if experts and sizes.get("num_experts_per_tok", 1) > experts:
        problems.append(f"num_experts_per_tok = {sizes['num_experts_per_tok']} is more than num_experts = {experts}")
    return problems


def is_positive(value: Any) -> bool:
    """Whether a value is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def head_dim(config: dict[str, Any]) -> int:
    """Return head_dim by the contents of a config.json; 0 if they lack it and what it is derived from."""
    heads = config.get("num_attention_heads")
    return config.get("head_dim") or (config.get("hidden_size", 0) // heads if heads else 0)


def end_tokens(config: dict[str, Any]) -> list[int]:
    """Return the end-of-sequence tokens that a config.json or a generation_config.json names."""
    ends = config.get("eos_token_id", DEFAULT_END.get(config.get("model_type", "")))
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def count_experts(config: dict[str, Any]) -> int:
    """Return the number of experts; 0 for a dense model."""
    return config.get("num_local_experts") or config.get("num_experts") or 0


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters with the current names and transformers' defaults."""
    return _rope(config, next((spelling for spelling in ROPE_SPELLINGS if config.get(spelling)), ""))


def _rope(config: dict[str, Any], spelling: str) -> dict[str, Any]:
    rope = dict(config.get(spelling) or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", 1))
    if rope["rope_type"] == "llama3":
        rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return rope


def malformed_rope(config: dict[str, Any]) -> list[str]:
    """Return messages about rotary parameters other than a table of plain values."""
    problems = []
    for spelling in ROPE_SPELLINGS:
        rope = config.get(spelling) or {}
        if not isinstance(rope, dict):
            problems.append(f"{spelling} must be a table, not {rope!r}")
        elif nested := [name for name, value in rope.items() if isinstance(value, dict)]:
            problems.append(f"{spelling} by type of layer is not supported ({', '.join(nested)})")
    return problems


def differing_spellings(config: dict[str, Any]) -> list[str]:
    """Return a message for each fact that a config, whose rotary parameters are well formed, spells twice and
    differently."""
    places = [spelling for spelling in ROPE_SPELLINGS if config.get(spelling)]
    pairs = [(config, name, config, other) for name, other in SPELLINGS]
    for place in places:
        inner = {f"{place}.{name}": value for name, value in config[place].items()}
        pairs.append((inner, f"{place}.rope_type", inner, f"{place}.type"))
        pairs += [(inner, f"{place}.{name}", config, name) for name in ("rope_theta", "partial_rotary_factor")]
    differing = [
        f"{name} is {a[name]!r} and {other} is {b[other]!r}; remove the wrong one"
        for a, name, b, other in pairs
        if a.get(name) is not None and b.get(other) is not None and a[name] != b[other]
    ]
    if len(places) == 2:
        first, second = (_rope(config, place) for place in places)
        names = [name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]
        differing += [
            f"{places[0]} and {places[1]} differ in {name} ({first.get(name)!r} and {second.get(name)!r}); remove the "
            "wrong one"
            for name in names
        ]
    return differing
