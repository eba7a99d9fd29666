"""Facts that a config.json can spell twice: transformers' reading of them is ours, and two values are an error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.models import load_family
from miles_spmd.models.hf_config import count_experts, head_dim, rope_parameters
from tests.models import tiny
from tests.models.published import LLAMA, QWEN3, QWEN3_MOE
from tests.ranks import Ranks
from tests.training.cases import build, config, oracle_scores, sequences

LLAMA3 = {key: value for key, value in tiny.LLAMA3_ROPE.items() if key not in ("rope_theta", "rope_type")}


def rewritten(name: str, folder: Path, **changes: Any) -> Path:
    """A checkpoint of ``name`` whose config.json has these changes; None removes a key."""
    shutil.copytree(tiny.checkpoint(name), folder)
    file = folder / "config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return folder


# all of the same model, but for the last two of Llama, whose frequencies are not scaled
SPELLINGS: dict[str, dict[str, Any]] = {
    "older": {"rope_parameters": None, "rope_theta": 777.0},
    "both": {"rope_parameters": {"rope_theta": 777.0, "rope_type": "default"}, "rope_theta": 777.0},
    "theta outside": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 777.0},
    "older table": {"rope_parameters": None, "rope_scaling": {"type": "default", "rope_theta": 777.0}},
    "both tables": {
        "rope_parameters": {"rope_theta": 777.0},
        "rope_scaling": {"type": "default", "rope_theta": 777.0},
    },
    "neither": {"rope_parameters": None},
}
SCALED: dict[str, dict[str, Any]] = {
    "older": {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
    "oldest": {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}},
    "both": {"rope_scaling": tiny.LLAMA3_ROPE},
}
CASES = [(name, changes) for name in tiny.BY_HAND if name != "qwen3-tied" for changes in SPELLINGS.values()]
CASES += [("llama", changes) for changes in SCALED.values()]


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_the_reading_is_that_of_transformers(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = rewritten(name, tmp_path / "model", **changes)
    theirs, family = AutoConfig.from_pretrained(folder), load_family(folder)
    ours = rope_parameters(family.config)
    assert {key: ours[key] for key in theirs.rope_parameters if key != "type"} == {
        key: value for key, value in theirs.rope_parameters.items() if key != "type"
    }
    rope = family.rope(0)
    assert rope.theta == theirs.rope_parameters["rope_theta"]
    assert rope.kind == theirs.rope_parameters["rope_type"]
    assert count_experts(family.config) == getattr(theirs, "num_experts", 0)
    assert head_dim(family.config) == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)


def scores(folder: Path) -> Any:
    trainer = build(config("qwen3", model={"hf_checkpoint": folder, "dtype": "float32"}))
    return trainer.log_probs([BATCH]).log_probs


BATCH = sequences((9, 30))


@pytest.mark.parametrize("name", [name for name in tiny.BY_HAND if name != "qwen3-tied"])
def test_log_probs_are_those_of_transformers(name: str, ranks: Ranks, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    changes = SCALED["oldest"] if name == "llama" else SPELLINGS["older table"]
    folder = rewritten(name, tmp_path / "model", **changes)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (found,) = ranks.run(1, scores, folder)
    for sequence, ours in zip(BATCH, found):
        theirs, _ = oracle_scores(model, sequence.tokens)
        scored = ours != 0  # tokens that are not trained are not scored
        assert scored.sum() > 3
        assert abs(ours - theirs.detach().numpy())[scored].max() < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            LLAMA | {"rope_scaling": None, "rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            r"rope_parameters.rope_theta is 500000.0 and rope_theta is 10000.0; remove the wrong one",
        ),
        (
            LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            r"rope_scaling and rope_parameters differ in rope_type \('llama3' and 'default'\)",
        ),
        (
            LLAMA | {"rope_parameters": tiny.LLAMA3_ROPE | {"factor": 4.0}},
            r"differ in factor \(8.0 and 4.0\)",
        ),
        (QWEN3 | {"rope_theta": None, "rope_scaling": {"type": "default"}}, "rope_theta must be a positive number"),
        (
            {key: value for key, value in QWEN3.items() if key != "rope_theta"}
            | {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 1e6}},
            r"differ in rope_theta \(10000.0 and 1000000.0\)",
        ),
        (QWEN3 | {"rope_scaling": {"rope_type": "default", "type": "linear"}}, "rope_scaling.type is 'linear'"),
        (QWEN3 | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "by type of layer is not supported"),
        (QWEN3 | {"rope_scaling": "linear"}, "rope_scaling must be a table, not 'linear'"),
        (QWEN3_MOE | {"num_local_experts": 64}, "num_local_experts is 64 and num_experts is 128"),
        (QWEN3 | {"dtype": "float32", "torch_dtype": "bfloat16"}, "dtype is 'float32' and torch_dtype is 'bfloat16'"),
        (
            {key: value for key, value in QWEN3.items() if key != "num_key_value_heads"},
            "num_key_value_heads is missing, for which transformers takes 32",
        ),
        (QWEN3 | {"layer_types": ["chunked_attention"]}, r"not supported \(chunked_attention\)"),
    ],
)
def test_two_values_for_one_fact_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_family(settings)
