"""The list of settings: complete, documented, in step with docs/settings.md."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from miles_spmd.cli import app
from miles_spmd.config import Config
from miles_spmd.config.describe import describe_settings, settings_page
from miles_spmd.config.table import walk

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_every_setting_has_a_meaning() -> None:
    settings = list(walk(Config))
    assert len(settings) > 100
    for setting in settings:
        meaning = (setting.field.description or "").strip()
        assert meaning.endswith("."), setting.dotted
        assert meaning[0].isupper() or meaning[0] == "`", setting.dotted


def test_the_page_is_in_step() -> None:
    in_step = PAGE.read_text() == settings_page()
    assert in_step, "docs/settings.md is out of date: miles-spmd settings --markdown > docs/settings.md"


def test_the_verb_prints_what_contains_a_word() -> None:
    run = CliRunner().invoke
    every = run(app, ["settings"]).stdout
    for setting in walk(Config):
        assert setting.is_table or setting.path[0] in ("megatron", "sglang") or f"{setting.dotted}: " in every
    found = run(app, ["settings", "TEMPERATURE"]).stdout
    assert found.startswith("rollout.rollout_temperature: float >= 0, default 1.0\n    Sampling temperature")
    assert "eval.eval_temperature: " in found
    assert "rollout.rollout_top_k" not in found
    assert run(app, ["settings", "--markdown"]).stdout == PAGE.read_text()
    nothing = run(app, ["settings", "no such word"])
    assert nothing.exit_code != 0


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("tensor_model_parallel_size", "megatron.tensor_model_parallel_size: int, default 1\n"),
        (
            "transformer_impl",
            'megatron.transformer_impl: "local" or "transformer_engine" or "inference_optimized", ',
        ),
        ("tp_size", "sglang.tp_size: int, default 1\n"),
        ("model_path", "sglang.model_path: str, default none\n    cannot be set here: set model.hf_checkpoint instead"),
    ],
)
def test_keys_of_the_backends_are_found(word: str, line: str) -> None:
    assert line in describe_settings(word)
