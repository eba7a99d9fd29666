"""The documentation, held against what it describes: its examples run, its tables agree with the recipes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from miles_spmd.config import Config
from miles_spmd.config.backends import backend_fields
from miles_spmd.config.checks import settings
from miles_spmd.config.load import load_config
from miles_spmd.config.table import walk

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "algorithms.md").read_text()
RECIPES = REPOSITORY / "configs" / "algorithms"
ROWS = re.findall(r"^\|.*\[(\w+)\]\(\.\./configs/algorithms/\1\.toml\) \|$", PAGE, re.MULTILINE)


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
