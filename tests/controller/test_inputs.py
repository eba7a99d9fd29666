"""What settings name is examined before anything starts, and all of its errors come with those of the settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.config import Config
from miles_spmd.config.load import ConfigError, load_config
from miles_spmd.config.table import walk
from miles_spmd.controller import inputs
from miles_spmd.controller.checkpoint_folders import FORMAT, ControllerState, mark, step_folder
from tests.worker.tiny_run import write_checkpoint, write_config

Check = Callable[..., list[str]]

PLUG_INS = """
def column(prompts, completions, answer, **columns):
    return [0.0] * len(prompts)

def many(a, b, c):
    return 0.0

NUMBER = 7
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("inputs") / "model")


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Path:
    return write_config(tmp_path, model, run={"mode": "rl"})


@pytest.fixture
def check(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    (tmp_path / "user_rewards.py").write_text(PLUG_INS)
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)  # where the recipe's data.jsonl lies

    def found(*overrides: str, task: str = "train") -> list[str]:
        try:
            load_config(recipe, overrides, inputs=partial(inputs.errors, task=task))
        except ConfigError as error:
            return error.errors
        return []

    return found


def rows(file: Path, *contents: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in contents))
    return file


def test_nothing_is_wrong_with_a_run_that_works(check: Check) -> None:
    assert check() == []


def test_everything_comes_in_one_list(check: Check, tmp_path: Path) -> None:
    evaluation = rows(tmp_path / "eval.jsonl", {"question": "2 + 2", "label": "4"})
    (tmp_path / "step").mkdir()
    found = check(
        "rolout_batch_size=2",
        "megatron.lr=nan",
        f"eval_prompt_data.test={evaluation}",
        "rm_type=user_rewards:nothing",
        "loss_type=no_such_module:f",
        f"checkpoint.load={tmp_path / 'step'}",
        "ref_load=nowhere",
    )
    starts = [
        "rolout_batch_size=2: unknown setting",
        "megatron.lr: must be a finite number",
        "model.ref_load: no folder nowhere",
        f"checkpoint.load: checkpoint {tmp_path / 'step'} is incomplete",
        "reward.rm_type = 'user_rewards:nothing' cannot be imported: AttributeError",
        "algorithm.loss_type = 'no_such_module:f' cannot be imported: ModuleNotFoundError",
        f"eval.eval_prompt_data.test: {evaluation}:1: missing key 'prompt'",
    ]
    assert len(found) == len(starts), found
    for message, start in zip(found, starts, strict=True):
        assert message.startswith(start)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rm_type=exits:reward", "cannot be imported: SystemExit"),
        ("rm_type=user_rewards:NUMBER", "must be a function"),
        ("rm_type=user_rewards:many", "has the parameters (a, b, c)"),
        ("rm_type=user_rewards:column", "requires answer, but the data has only"),
        (
            "reward.further=[{rm_type='user_rewards:absent'}]",
            "reward.further.0.rm_type = ",
        ),
        ("reward.further=[{rm_type='user_rewards:column'}]", "requires answer, but the data has only"),
        ("eval.sets=[{name='a', prompt_data='data.jsonl', rm_type='user_rewards:many'}]", "eval.sets.0.rm_type = "),
        ("eval.sets=[{name='a', prompt_data='data.jsonl', label_key='solution'}]", "eval.sets.0.prompt_data: "),
        ("reward_post_process=user_rewards:absent", "algorithm.reward_post_process = 'user_rewards:absent' cannot"),
        ("engine=user_rewards:absent", "rollout.engine = 'user_rewards:absent' cannot be imported"),
        ("label_key=solution", "missing key 'solution' (data.label_key)"),
    ],
)
def test_plug_ins_and_columns(check: Check, override: str, message: str) -> None:
    found = check(override)
    assert found
    assert all(message in error for error in found), found


def test_a_family_that_is_not_supported(check: Check, model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(model / name)
    shape = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": "mamba"}))
    (tmp_path / "model.safetensors").touch()
    (found,) = check(f"hf_checkpoint={tmp_path}")
    assert found.startswith("model.hf_checkpoint: model_type 'mamba' is not supported; supported: llama")


def test_a_checkpoint_after_the_last_step(check: Check, tmp_path: Path) -> None:
    saved = step_folder(tmp_path / "other", 6)
    saved.mkdir(parents=True)
    mark(saved, ControllerState(6, 1234, format=FORMAT))
    load = f"checkpoint.load={saved}"
    assert check(load, "run.num_rollout=6") == []
    (error,) = check(load, "run.num_rollout=5")
    assert error.startswith(f"run.num_rollout: 5 steps are fewer than the 6 after which {saved} was written; set it")
    assert check(load, "run.num_rollout=5", task="eval") == []
    own = ["run.output_dir=.", "run.name=other", "checkpoint.resume=true"]
    assert check(*own, "run.num_rollout=6") == []
    assert len(check(*own, "run.num_rollout=5")) == 1


def test_an_evaluation_reads_no_training_data(check: Check) -> None:
    assert check("label_key=solution", task="eval") == []


def test_plug_points_are_those_of_the_settings() -> None:
    documented = {s.dotted for s in walk(Config) if (s.field.description or "").startswith("Plug point")}
    assert documented - {s for s in documented if ".N." in s} == {*inputs.PLUG_POINTS, "reward.rm_type"}


def test_a_model_of_the_hub(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is downloaded where that is allowed; otherwise the command is given."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (found,) = check("hf_checkpoint=Nobody/No-Such-Model-0.1B")
    assert found == (
        "model.hf_checkpoint: no folder Nobody/No-Such-Model-0.1B; where there is a network, `hf download "
        "Nobody/No-Such-Model-0.1B --local-dir models/No-Such-Model-0.1B` gets it; then name models/No-Such-Model-0.1B"
    )


def test_a_model_of_the_hub_is_downloaded(check: Check, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    asked = []

    def download(repo_id: str, *, local_files_only: bool = False, **_: object) -> str:
        asked.append((repo_id, local_files_only))
        if local_files_only:
            raise FileNotFoundError(repo_id)
        if repo_id == "Some/Model":
            return str(model)
        raise OSError("no route to host\nand a long story")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert check("hf_checkpoint=Some/Model") == []
    assert asked == [("Some/Model", True), ("Some/Model", False)]
    (found,) = check("hf_checkpoint=Other/Model")
    assert found.startswith(
        "model.hf_checkpoint: no folder Other/Model, and it cannot be downloaded: no route to host;"
    )
