"""What a config.json leaves out, or says in another way, is what transformers takes for it: the model that is described
here equals the one described by the same config as transformers has read it; what transformers refuses is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from miles_spmd.models import Family, load_family
from tests.models import tiny

ALTERNATING = ["full_attention", "sliding_attention"] * 2
FULL = ["full_attention"] * 4
NUMBERS = [1.0] * 4
LONGROPE = {"short_factor": NUMBERS, "long_factor": [2.0] * 4}
PHI = {"rope_parameters": None, "original_max_position_embeddings": 32}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"layer_types": ALTERNATING}),
    ("gemma2", {"layer_types": FULL}),
    ("gemma2", {"layer_types": None}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma3_text", {"layer_types": None, "_sliding_window_pattern": None, "sliding_window_pattern": 3}),
    ("gemma3_text", {"layer_types": ALTERNATING}),
    ("gemma3_text", {"final_logit_softcapping": 3.0}),
    ("mistral", {"sliding_window": None}),
    ("mixtral", {"sliding_window": 7}),
    ("phi3", PHI | {"rope_scaling": LONGROPE | {"type": "longrope"}}),
    ("glm4", {"attention_bias": False}),
    ("glm4_moe", {"first_k_dense_replace": 0, "n_group": 1, "norm_topk_prob": False}),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma3_text", {"attn_logit_softcapping": 2.0}, "attn_logit_softcapping is not supported"),
    ("gemma3_text", {"layer_types": None, "_sliding_window_pattern": 3}, "_sliding_window_pattern = 3 is not read by"),
    ("gemma3_text", {"tie_word_embeddings": False}, "tie_word_embeddings = false is not supported"),
    (
        "gemma3_text",
        {"rope_scaling": {"type": "linear", "factor": 8.0}},
        "rope_scaling.type is not read by transformers",
    ),
    ("gemma3_text", {"sliding_window_pattern": 2}, "sliding_window_pattern and layer_types differ"),
    ("gemma2", {"layer_types": None, "sliding_window_pattern": 3}, "sliding_window_pattern = 3 is not read by"),
    ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings = false is not supported"),
    ("gemma2", {"layer_types": FULL[1:]}, "layer_types names 3 layers, num_hidden_layers is 4"),
    ("gemma2", {"layer_types": [FULL]}, r"layer_types must be a list of names, not \[\["),
    ("gemma2", {"query_pre_attn_scalar": "24"}, "query_pre_attn_scalar must be a positive number, not '24'"),
    ("mistral", {"sliding_window": 0}, "sliding_window must be a positive integer, not 0"),
    ("phi3", PHI | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "older names of longrope in this family"),
    ("phi3", PHI | {"rope_scaling": LONGROPE | {"type": "su"}}, "older names of longrope in this family"),
    ("phi3", {"interpolate_factor": 2}, "interpolate_factor must be 1, not 2"),
    ("mixtral", {"num_experts_per_tok": 1}, "the weight of one expert among the chosen ones is always 1"),
    ("glm4_moe", {"norm_topk_prob": "false"}, "norm_topk_prob must be true or false, not 'false'"),
    (
        "glm4_moe",
        {"n_group": None, "first_k_dense_replace": -1},
        "n_group must be .* first_k_dense_replace must be an int",
    ),
    (
        "glm4_moe",
        {"n_group": 3},
        "config.json of this glm4_moe model: router: 8 experts cannot be divided into 3 groups",
    ),
]


def written(name: str) -> dict[str, Any]:
    return json.loads((tiny.checkpoint(name) / "config.json").read_text())


def description(family: Family) -> tuple[Any, ...]:
    outside = family.embedding_scale, family.logit_softcap, family.tied_embeddings, family.max_sequence_length
    return family.layers, outside, family.checkpoint_tensors(), family.config["rms_norm_eps"]


def as_transformers(config: dict[str, Any]) -> Family:
    read = json.loads(CONFIG_MAPPING[config["model_type"]].from_dict(config).to_json_string(use_diff=False))
    if tables := {key: value for key, value in read["rope_parameters"].items() if isinstance(value, dict)}:
        read["rope_parameters"] = tables  # beside which transformers leaves defaults that no layer reads
    return load_family(read)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_a_field_that_is_absent(name: str) -> None:
    config, accepted = written(name), 0
    for field in config.keys() - {"model_type"}:
        changed = {key: value for key, value in config.items() if key != field}
        try:
            family = load_family(changed)
        except ValueError:  # it is required
            continue
        assert description(family) == description(as_transformers(changed)), field
        accepted += 1
    assert accepted > 5


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_a_field_with_another_value(name: str, changes: dict[str, Any]) -> None:
    config = written(name) | changes
    assert description(load_family(config)) == description(as_transformers(config))


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_family(written(name) | changes)


def test_only_the_layers_that_predict_further_tokens_are_ignored() -> None:
    config = written("glm4_moe") | {"num_nextn_predict_layers": 2}
    family = load_family(config)
    assert [family.is_ignored(f"model.layers.{number}.eh_proj.weight") for number in (3, 4, 5, 6)] == [0, 1, 1, 0]
    del config["num_nextn_predict_layers"]
    assert not load_family(config).is_ignored("model.layers.4.eh_proj.weight")
