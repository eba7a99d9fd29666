"""Engine and trainer with rotary positions of every kind: bitwise equal to each other, and as in transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers

from miles_spmd.config import Config
from miles_spmd.models import FAMILIES
from miles_spmd.models.families.llama import Llama
from miles_spmd.models.rope import Rope
from tests.generation.conformance import TOLERANCE
from tests.invariant.side_by_side import checkpoint
from tests.models.conformance import both, difference
from tests.ranks import Ranks
from tests.training.cases import build, sequences

CONTEXT = 160
SCALED = {"factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
# of sequences of 20 to 104 tokens
TABLES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3},  # for which SGLang requires a float
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": SCALED | {"rope_type": "llama3", "low_freq_factor": 1.5, "high_freq_factor": 5.0},
    "yarn": SCALED | {"rope_type": "yarn"},
    "yarn, own factor": SCALED | {"rope_type": "yarn", "attention_factor": 1.3, "beta_fast": 8, "truncate": False},
    "short longrope": {"rope_type": "longrope", "original_max_position_embeddings": CONTEXT},
    "long longrope": {"rope_type": "longrope", "original_max_position_embeddings": 19},
}
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 5.0, 9.0]}


class Turned(Llama):
    """Half of every head is rotated, in pairs of neighbours, as GLM-4's are."""

    fields = ("rope_is_neox_style",)
    partial_rotary = interleaved_rotary = True


class Alternating(Llama):
    def rope(self, layer: int) -> Rope | None:
        rope = super().rope(layer)
        assert rope
        return replace(rope, theta=1e4 if layer % 2 else 77.0)


class Without(Llama):
    """The first layer has no positions."""

    def rope(self, layer: int) -> Rope | None:
        return super().rope(layer) if layer else None


class Still(Llama):
    """The first layer's angles are 0, to fp32's precision of their cosines and sines."""

    def rope(self, layer: int) -> Rope | None:
        return super().rope(layer) if layer else Rope(1e4, 8, "linear", factor=1e30)


def llama(folder: Path, table: dict[str, Any]) -> transformers.PreTrainedModel:
    factors = FACTORS if table["rope_type"] == "longrope" else {}
    checkpoint(folder, "llama", vocab_size=100, max_position_embeddings=256, rope_parameters=table | factors)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_kinds(ranks: Ranks, tmp_path: Path, table: dict[str, Any]) -> None:
    model = llama(tmp_path, table)
    (found,) = ranks.run(1, both, tmp_path)
    assert found[1:] == (0, 1)
    assert difference(model, found) < TOLERANCE


def glm(folder: Path, **settings: Any) -> transformers.PreTrainedModel:
    """A GLM model of transformers with the weights of a Llama checkpoint, which it writes with the rotary positions of
    this one."""
    half = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    theirs = llama(folder, half)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    common = {key: value for key, value in config.items() if hasattr(theirs.config, key) and "token" not in key}
    names = ("architectures", "model_type", "transformers_version", "dtype")
    model = transformers.GlmForCausalLM(
        transformers.GlmConfig(**{k: v for k, v in common.items() if k not in names}, pad_token_id=None)
    )
    weights = theirs.state_dict()
    for layer in range(config["num_hidden_layers"]):
        gate, up = (weights.pop(f"model.layers.{layer}.mlp.{name}_proj.weight") for name in ("gate", "up"))
        weights[f"model.layers.{layer}.mlp.gate_up_proj.weight"] = torch.cat([gate, up])
    model.load_state_dict(weights)
    return model.eval()


def test_part_of_a_head_in_pairs_of_neighbours(ranks: Ranks, tmp_path: Path) -> None:
    """The share is inside the table, where SGLang's Llama does not look for it."""
    model = glm(tmp_path, rope_is_neox_style=False)
    (found,) = ranks.run(1, both, tmp_path, Turned)
    assert found[1:] == (0, 1)
    assert difference(model, found) < TOLERANCE


@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 2}], ids=["one", "PP2"])
def test_layers_with_different_positions(ranks: Ranks, tmp_path: Path, layout: dict[str, int]) -> None:
    llama(tmp_path, TABLES["linear"])
    answers = ranks.run(len(layout) + 1, both, tmp_path, Alternating, layout)
    assert [answer[1:] for answer in answers] == [(0, 2)] * len(answers)
    (found,) = ranks.run(1, both, tmp_path)
    assert found.generated != answers[0].generated


def scores(folder: Path, family: type[Llama]) -> list[np.ndarray]:
    with patch.dict(FAMILIES, {"llama": family}):
        trainer = build(Config(model={"hf_checkpoint": folder, "dtype": "float32"}, data={"prompt_data": "none"}))
    return trainer.log_probs([sequences((9, 30))]).log_probs


def test_layers_without_positions(ranks: Ranks, tmp_path: Path) -> None:
    llama(tmp_path, TABLES["linear"])
    without, still, rotated = (ranks.run(1, scores, tmp_path, family)[0] for family in (Without, Still, Llama))
    assert all(map(np.array_equal, without, still))
    assert not any(map(np.array_equal, without, rotated))


def refusal(folder: Path, family: type[Llama]) -> str:
    from sglang.srt import runtime_context

    from miles_spmd.generation.sglang import process_groups

    with pytest.raises(ValueError, match="SGLang") as raised:
        both(folder, family)
    process_groups.leave()  # what an engine that could not be constructed leaves
    runtime_context.reset_context()
    return str(raised.value)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (Turned, "rotates 4 dimensions in pairs 2 apart, and this model has 4 dimensions in pairs of neighbours"),
        (Without, "SGLang's model.layers.0.self_attn rotates queries and keys, and this model has no positions there"),
    ],
)
def test_positions_that_sglang_would_not_have(ranks: Ranks, tmp_path: Path, family: type[Llama], message: str) -> None:
    if family is Turned:
        glm(tmp_path)
    else:
        llama(tmp_path, TABLES["linear"])
    (found,) = ranks.run(1, refusal, tmp_path, family)
    assert message in found
