"""The configurations we ship: complete, minimal, and what their names say."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from miles_spmd.config.backends import backend_fields
from miles_spmd.config.checks import doubts
from miles_spmd.config.load import BACKENDS, TABLES, load_config

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted((CONFIGS / "algorithms").glob("*.toml"))
# What a recipe is named after: these settings have these values, where all the other recipes' differ.
MEANING = {
    "grpo": {
        "mode": "rl",
        "advantage_estimator": "grpo",
        "dynamic_sampling_filter": None,
        "use_tis": False,
        "use_opsm": False,
        "kl_coef": 0.0,
        "opd_kl_coef": 0.0,
    },
    "dr_grpo": {"advantage_estimator": "dr_grpo", "loss_aggregation": "constant"},
    "rloo": {"advantage_estimator": "rloo"},
    "reinforce_plus_plus": {"advantage_estimator": "reinforce_plus_plus"},
    "reinforce_plus_plus_baseline": {"advantage_estimator": "reinforce_plus_plus_baseline"},
    "gspo": {"surrogate": "gspo"},
    "cispo": {"surrogate": "cispo"},
    "dapo": {"dynamic_sampling_filter": "reward_nonzero_std", "loss_aggregation": "token_mean"},
    "ppo": {"advantage_estimator": "ppo"},
    "opd": {"opd_kl_coef": 1.0, "opd_log_prob_top_k": 0},
    "opd_top_k": {"opd_kl_coef": 1.0, "opd_log_prob_top_k": 8},
    "tis": {"use_tis": True, "tis_function": "tis"},
    "mis": {"use_tis": True, "tis_function": "mis"},
    "icepop": {"use_tis": True, "tis_function": "icepop"},
    "opsm": {"use_opsm": True},
    "kl_in_reward": {"advantage_estimator": "grpo", "kl_coef": 0.001},
    "sft": {"mode": "sft"},
    "dpo": {"mode": "dpo", "preference_loss": "dpo"},
    "ipo": {"mode": "dpo", "preference_loss": "ipo"},
    "simpo": {"mode": "dpo", "preference_loss": "simpo"},
    "reward_model": {"mode": "rm"},
}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.toml")), ids=lambda p: p.stem)
def test_it_loads_and_nothing_in_it_is_doubtful(path: Path) -> None:
    assert doubts(load_config(path, check_files=False)) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_it_says_only_what_is_not_so_anyway(path: Path) -> None:
    config = load_config(path, check_files=False)
    for table, said in tomllib.loads(path.read_text()).items():
        if table in BACKENDS:
            fields = backend_fields(table)
            superfluous = [leaf for leaf, value in said.items() if value == fields[leaf].default]
        else:
            settings = getattr(config, table)
            superfluous = [leaf for leaf in said if getattr(settings, leaf) == TABLES[table].model_fields[leaf].default]
        assert not superfluous, f"[{table}]"


def test_each_recipe_is_the_one_that_its_name_says() -> None:
    assert {path.stem for path in RECIPES} == set(MEANING)
    for path in RECIPES:
        config = load_config(path, check_files=False)
        assert config.run.name == path.stem
        chosen = {"mode": config.run.mode, "surrogate": config.algorithm.surrogate} | config.algorithm.model_dump()
        fitting = [
            name for name, meaning in MEANING.items() if all(chosen[key] == value for key, value in meaning.items())
        ]
        assert fitting == [path.stem]
