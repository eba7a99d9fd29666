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
# What transformers takes for rotary parameters that a config lacks, by model_type where it is not the common value.
DEFAULT_THETA = {
    "apertus": 12e6,
    "cohere": 5e5,
    "ernie4_5": 5e5,
    "ernie4_5_moe": 5e5,
    "gpt_oss": 15e4,
    "minimax_m2": 5e6,
    "mixtral": 1e6,
    "phimoe": 1e6,
    "smollm3": 2e6,
}
DEFAULT_PARTIAL = {"glm": 0.5, "glm4": 0.5, "glm4_moe": 0.5, "nemotron": 0.5, "qwen3_next": 0.25, "stablelm": 0.25}
DEFAULT_ORIGINAL = {"phi3": 4096}
# Where layers differ, their parameters are in a table by type of layer; the older spelling has one theta for each type,
# under another key, and a table of rope_scaling, which belongs to the first type.
LAYER_THETA = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}
FULL = "full_attention"
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
    attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens cache_implementation
    chunk_size_feed_forward cls_token_id cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample early_stopping embd_pdrop encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id hidden_dropout id2label is_decoder is_encoder_decoder
    is_llama_config label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_router_logits output_scores prefix
    pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate router_aux_loss_coef sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript transformers.js_config
    transformers_version typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
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
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "sliding_window",
    "sliding_window_pattern",
    "_sliding_window_pattern",
)
COUNTS = ("first_k_dense_replace", "num_nextn_predict_layers")
NUMBERS = (
    "rms_norm_eps",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "routed_scaling_factor",
)
FLAGS = (
    "attention_bias",
    "mlp_bias",
    "norm_topk_prob",
    "qkv_bias",
    "tie_word_embeddings",
    "use_qk_norm",
    "use_sliding_window",
)
# Of which transformers allows no null either; a null elsewhere is as if the field were absent.
NOT_NULL = {*FLAGS, "first_k_dense_replace", "n_group", "n_shared_experts", "routed_scaling_factor", "topk_group"}


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
    """Return messages about sizes, numbers and flags that no model can have; which of them a model needs is not known
    here."""
    sizes = {key: config[key] for key in SIZES if config.get(key) is not None}
    unused = (
        ["sliding_window"] if config.get("sliding_window") == 0 and config.get("use_sliding_window") is False else []
    )
    kinds = (
        ("a positive integer", SIZES, lambda value: is_integer(value) and value > 0),
        ("an integer of at least 0", COUNTS, lambda value: is_integer(value) and value >= 0),
        ("a positive number", NUMBERS, is_positive),
        ("true or false", FLAGS, lambda value: isinstance(value, bool)),
    )
    problems = [
        f"{key} must be {kind}, not {config[key]!r}"
        for kind, keys, fits in kinds
        for key in keys
        if key in config
        and key not in unused
        and (config[key] is not None or key in NOT_NULL)
        and not fits(config[key])
    ]
    types, layers = config.get("layer_types"), sizes.get("num_hidden_layers")
    if types is not None and not (isinstance(types, list) and all(isinstance(name, str) for name in types)):
        problems.append(f"layer_types must be a list of names, not {types!r}")
    elif types is not None and is_integer(layers) and len(types) != layers:
        problems.append(f"layer_types names {len(types)} layers, num_hidden_layers is {layers}")
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


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
    return config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts") or 0


def expert_width(config: dict[str, Any]) -> int:
    """Return the width of an expert of a model that has experts; 0 where the config lacks it."""
    return config.get("moe_intermediate_size") or config.get("intermediate_size") or 0


def rope_parameters(config: dict[str, Any], layer_type: str = "") -> dict[str, Any]:
    """Return the rotary parameters with the current names and transformers' defaults, of layers of ``layer_type`` where
    the model has parameters by type of layer."""
    if layer_type:
        return _rope(config, _layer_table(config, layer_type), layer_type)
    return _rope(config, next((config[spelling] for spelling in ROPE_SPELLINGS if config.get(spelling)), {}))


def _layer_table(config: dict[str, Any], layer_type: str) -> dict[str, Any]:
    of_type = (config.get("rope_parameters") or {}).get(layer_type) or {}
    return of_type | (config.get("rope_scaling") or {}) if layer_type == FULL else of_type


def _rope(config: dict[str, Any], table: dict[str, Any], layer_type: str = "") -> dict[str, Any]:
    rope, model_type = dict(table), config.get("model_type", "")
    rope.setdefault("rope_type", rope.pop("type", "default"))
    theta, otherwise = LAYER_THETA.get(layer_type, ("rope_theta", DEFAULT_THETA.get(model_type, 1e4)))
    rope.setdefault("rope_theta", config.get(theta, otherwise))
    partial = config.get("partial_rotary_factor", DEFAULT_PARTIAL.get(model_type, 1))
    rope.setdefault("partial_rotary_factor", partial)
    if rope["rope_type"] in ("llama3", "longrope", "yarn"):
        outside = config.get("original_max_position_embeddings", DEFAULT_ORIGINAL.get(model_type))
        if outside is not None and not layer_type:
            rope["original_max_position_embeddings"] = outside
        rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return rope


def malformed_rope(config: dict[str, Any], layer_type: str = "") -> list[str]:
    """Return messages about rotary parameters other than a table of plain values; for layers of ``layer_type``, other
    than such tables by type of layer."""
    problems = []
    for spelling in ROPE_SPELLINGS:
        rope = config.get(spelling) or {}
        if not isinstance(rope, dict):
            problems.append(f"{spelling} must be a table, not {rope!r}")
            continue
        nested = [name for name, value in rope.items() if isinstance(value, dict)]
        if spelling == "rope_parameters" and layer_type:
            if plain := [name for name in rope if name not in nested]:
                problems.append(f"{spelling} must have a table for each type of layer, not {', '.join(plain)}")
        elif spelling == "rope_scaling" and layer_type and rope.get("type") and "rope_type" not in rope:
            problems.append(f"{spelling}.type is not read by transformers in this model; write {spelling}.rope_type")
        elif nested:
            problems.append(f"{spelling} by type of layer is not supported ({', '.join(nested)})")
    return problems


def differing_spellings(config: dict[str, Any], layer_type: str = "") -> list[str]:
    """Return a message for each fact that a config, whose rotary parameters are well formed, spells twice and
    differently."""
    tables = {spelling: config[spelling] for spelling in ROPE_SPELLINGS if config.get(spelling)}
    outer = {"rope_theta": "rope_theta", "original_max_position_embeddings": "original_max_position_embeddings"}
    if layer_type:
        inner = tables.pop("rope_parameters", {}).get(layer_type)
        tables = {key: value for key, value in tables.items() if layer_type == FULL}
        tables |= {f"rope_parameters.{layer_type}": inner} if inner else {}
        outer = {"rope_theta": LAYER_THETA[layer_type][0]} if layer_type in LAYER_THETA else {}
    outer["partial_rotary_factor"] = "partial_rotary_factor"
    pairs = [(config, name, config, other) for name, other in SPELLINGS]
    for place, table in tables.items():
        inside = {f"{place}.{name}": value for name, value in table.items()}
        pairs.append((inside, f"{place}.rope_type", inside, f"{place}.type"))
        pairs += [(inside, f"{place}.{name}", config, other) for name, other in outer.items()]
    differing = [
        f"{name} is {a[name]!r} and {other} is {b[other]!r}; remove the wrong one"
        for a, name, b, other in pairs
        if a.get(name) is not None and b.get(other) is not None and a[name] != b[other]
    ]
    if len(tables) == 2:
        places = list(tables)
        first, second = (_rope(config, table, layer_type) for table in tables.values())
        names = [name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]
        differing += [
            f"{places[0]} and {places[1]} differ in {name} ({first.get(name)!r} and {second.get(name)!r}); remove the "
            "wrong one"
            for name in names
        ]
    return differing
