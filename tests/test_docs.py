"""The documentation, held against what it describes: its examples run, its tables agree with the recipes."""

from __future__ import annotations

import math
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from miles_spmd.algorithms.advantages import compute_advantages
from miles_spmd.algorithms.corrections import correct
from miles_spmd.algorithms.losses import PolicyLoss
from miles_spmd.config import AlgorithmConfig, Config
from miles_spmd.config.backends import backend_fields
from miles_spmd.config.checks import settings
from miles_spmd.config.load import load_config
from miles_spmd.config.table import walk
from miles_spmd.types.rollout_batch import RolloutBatch
from miles_spmd.types.token_batch import TokenBatch

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "algorithms.md").read_text()
RECIPES = REPOSITORY / "configs" / "algorithms"
ROWS = re.findall(r"^\|.*\[(\w+)\]\(\.\./configs/algorithms/\1\.toml\) \|$", PAGE, re.MULTILINE)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_tables_have_every_recipe_once() -> None:
    assert sorted(ROWS) == sorted(path.stem for path in RECIPES.glob("*.toml"))


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_what_its_recipe_says(name: str) -> None:
    (row,) = [line for line in PAGE.splitlines() if f"configs/algorithms/{name}.toml" in line]
    config = load_config(RECIPES / f"{name}.toml", check_files=False)
    named = re.findall(r"`(\w+ = [^`]+)`", row.split("|")[2])
    assert named
    for said in named:
        ((leaf, value),) = tomllib.loads(said).items()
        assert settings(config)[leaf] == value


def test_settings_exist() -> None:
    """Every name in code that looks like a setting is one, or a metric, or a value that a setting may have."""
    text = re.sub(r"^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    described = (REPOSITORY / "miles_spmd" / "config" / "algorithm.py").read_text()
    known = {setting.path[-1] for setting in walk(Config) if not setting.is_table} | {*backend_fields("megatron")}
    names = re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", text)
    assert len(names) > 20
    for name in names:
        assert name in known or f'"{name}"' in described, name


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AlgorithmConfig:
    """The page's module where it can be imported, and its settings."""
    (code,) = blocks("python")
    (settings,) = blocks("toml")
    (tmp_path / "my_algorithms.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_algorithms", raising=False)
    return AlgorithmConfig(**tomllib.loads(settings)["algorithm"])


def test_a_users_advantage_and_correction(users: AlgorithmConfig) -> None:
    masks = [np.asarray(mask, np.float32) for mask in ([0, 1, 1], [0, 1], [0, 1], [0, 0, 1])]
    engine = [np.asarray(values, np.float32) for values in ([0, -1, -8], [0, -7], [0, -6.8], [0, 0, -2])]
    batch = RolloutBatch(
        rewards=np.asarray([1.0, 0.0, 0.5, 0.5]),
        group_ids=np.asarray([0, 0, 1, 1]),
        masks=masks,
        old_log_probs=engine,
        rollout_log_probs=engine,
    )
    estimate = compute_advantages(batch, users)
    assert [a.tolist() for a in estimate.advantages] == [[0, 1, 1], [0, 0], [0, 1], [0, 0, 1]]
    assert estimate.metrics["best_responses"] == 0.75
    correction = correct(batch, users)
    assert correction is not None
    assert [w.tolist() for w in correction.policy_weights] == [[0, 1, 0], [0, 0], [0, 1], [0, 0, 1]]
    assert correction.metrics["kept_tokens"] == 3


def test_a_users_policy_term(users: AlgorithmConfig) -> None:
    advantages, old, new = [2.0, -1.0, 2.0], [-1.0, -1.0, -1.0], [-0.5, -0.5, -1.0]
    log_probs = torch.tensor(new, requires_grad=True)
    tokens = TokenBatch(torch.ones(3), advantages=torch.tensor(advantages), old_log_probs=torch.tensor(old))
    loss, sums = PolicyLoss(users)(log_probs, torch.zeros(3), tokens)

    def term(a: float, log_pi: float, log_old: float) -> float:
        tau = 1.0 if a > 0 else 1.05
        return -a * 4 / tau / (1 + math.exp(-tau * (math.exp(log_pi - log_old) - 1)))

    assert loss.tolist() == pytest.approx([term(*values) for values in zip(advantages, new, old)], rel=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    step = 1e-5
    slopes = [(term(a, n + step, o) - term(a, n - step, o)) / (2 * step) for a, n, o in zip(advantages, new, old)]
    assert gradient.tolist() == pytest.approx(slopes, rel=1e-5)
    assert gradient[2].item() == pytest.approx(-2.0)  # where nothing has changed it is the policy gradient
    assert sums["pg_clipfrac"] == 0
