"""Nested tables and lists of tables: whatever a model declares can be set, overridden, dumped and described."""

from __future__ import annotations

from typing import Any

import pytest

from miles_spmd.config.describe import describe_settings, settings_page
from miles_spmd.config.load import ConfigError, dump_config, make_tables
from miles_spmd.config.table import PositiveFloat, PositiveInt, Table


class Limits(Table):
    seconds: PositiveFloat = 10.0
    """Seconds of one call."""
    retries: int | None = 3


class Environment(Table):
    name: str
    """Name of the environment."""
    weight: PositiveFloat = 1.0
    limits: Limits = Limits()


class EvalSet(Table):
    path: str
    top_k: PositiveInt | None = 5


class Eval(Table):
    interval: int = 0
    seconds: PositiveFloat = 60.0
    sets: list[EvalSet] = []


class Lora(Table):
    rank: PositiveInt
    alpha: float = 1.0


class Root(Table):
    limits: Limits = Limits()
    """Limits of the run."""
    environments: list[Environment] = []
    """What the policy acts in."""
    eval: Eval = Eval()
    lora: Lora | None = None


RAW: dict[str, Any] = {"environments": [{"name": "a"}, {"name": "b", "limits": {"seconds": 3}}]}


def make(*overrides: str, **raw: Any) -> Root:
    return make_tables(Root, raw or {"environments": [dict(entry) for entry in RAW["environments"]]}, overrides)


def errors(*overrides: str, **raw: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        make(*overrides, **raw)
    return error.value.errors


def test_overrides_reach_any_depth() -> None:
    root = make(
        "environments.0.name=7",  # a setting of text takes any text
        "environments.1.limits.seconds=5",
        "environments.0.limits.retries=none",
        "environments.2.name=c",  # one past the end appends
        "environments.2.weight=0.5",
        "interval=4",
        "sets.0.path=x.jsonl",
        "eval.sets.0.top_k=none",
        "lora.rank=8",
        "retries=1",
    )
    assert [(e.name, e.weight, e.limits.seconds, e.limits.retries) for e in root.environments] == [
        ("7", 1.0, 10.0, None), ("b", 1.0, 5.0, 3), ("c", 0.5, 10.0, 3),
    ]  # fmt: skip
    assert root.eval == Eval(interval=4, sets=[EvalSet(path="x.jsonl", top_k=None)])
    assert root.lora == Lora(rank=8)
    assert root.limits.retries == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seconds=1", "is ambiguous: write limits.seconds or eval.seconds"),
        ("environments.3.name=x", "environments has 2 entries: environments.2 appends one"),
        ("environments.x.name=1", "environments is a list: 'x' must be an entry's number"),
        ("environments.-1.name=1", "environments is a list: '-1' must be an entry's number"),
        ("environments.0.name.x=1", "environments.0.name is neither a table nor a list"),
        ("eval=1", "this is a table: set one of its keys, eval.KEY=value"),
        ("intervall=1", "unknown setting; did you mean interval?"),
        ("environments.0.wieght=1", "environments.0.wieght: unknown key; did you mean weight?"),
        ("environments.0.limits.seconds=-1", "environments.0.limits.seconds: must be greater than 0, got -1"),
        ("environments.2.weight=1", "environments.2.name: is missing and has no default"),
        ("lora.alpha=2.0", "lora.rank: is missing and has no default"),
        ("eval.top_k=1", "eval.top_k: belongs in [[eval.sets]]"),
    ],
)
def test_an_override_that_fits_nowhere(override: str, message: str) -> None:
    (found,) = errors(override)
    assert message in found


def test_all_errors_come_at_once() -> None:
    raw = {"environments": [{"name": 1}, {"wieght": 1}], "lora": {"alpha": 1}, "eval": {"sets": {}}, "limts": {}}
    assert errors("limits.seconds='x'", "seconds=1", **raw) == [
        "seconds=1: is ambiguous: write limits.seconds or eval.seconds",
        "limits.seconds: must be a valid number, got 'x'",
        "environments.0.name: must be a valid string, got 1",
        "environments.1.name: is missing and has no default",
        "environments.1.wieght: unknown key; did you mean weight?",
        "eval.sets: must be a list, got {}",
        "lora.rank: is missing and has no default",
        "limts: unknown table; did you mean limits?",
    ]


def test_dumped_tables_load_back_equal() -> None:
    import tomllib

    root = make("environments.0.limits.retries=none", "sets.0.path=x", "sets.0.top_k=none", "lora.rank=2")
    assert make_tables(Root, tomllib.loads(dump_config(root))) == root


def test_they_are_described() -> None:
    text = describe_settings("", Root)
    assert "environments.N.limits.seconds: float > 0, default 10.0\n    Seconds of one call." in text
    assert "environments.N.name: str, required" in text
    page = settings_page(Root)
    assert "## [[environments]]\n\nWhat the policy acts in.\n" in page
    assert "## [limits]\n\nLimits of the run.\n" in page
