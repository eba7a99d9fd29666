"""What settings name is examined before anything starts, and all of its errors come with those of the settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

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
        f"checkpoint.load: checkpoint {tmp_path / 'step'} is none (controller.json is missing)",
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
    assert found.startswith("model.hf_checkpoint: model_type 'mamba' is not supported")


def changed(model: Path, folder: Path, /, **config: Any) -> Path:
    """A copy of a checkpoint with other contents of config.json."""
    shutil.copytree(model, folder)
    shape = json.loads((model / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


def test_weights_are_compared_with_their_model(check: Check, model: Path, tmp_path: Path) -> None:
    """By what the headers of the files say, before any rank starts."""
    folder = changed(model, tmp_path / "other", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(31)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, folder / "model.safetensors")
    found = check(f"hf_checkpoint={folder}")
    start = f"model.hf_checkpoint: {folder}: "
    assert start + "tensor model.layers.2.mlp.down_proj.weight is missing" in found
    assert start + "model.safetensors: model.norm.weight has dtype I8; use the checkpoint in BF16" in found
    wrong = "model.safetensors: model.layers.0.input_layernorm.weight has shape [31], the model needs [32]"
    assert start + wrong in found
    extra = "model.safetensors: the qwen3 model has no tensor model.layers.0.self_attn.q_proj.bias"
    assert start + extra in found
    assert len(found) == 3 + 11
    (found_one,) = check(f"ref_load={folder}", "kl_coef=0.1")[:1]
    assert found_one.startswith("model.ref_load: ")
    whole = (model / "model.safetensors").read_bytes()
    cut = changed(model, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes(whole[:-100])
    (truncated,) = check(f"hf_checkpoint={cut}")
    assert "model.safetensors is truncated" in truncated


def test_sizes_that_no_model_has(check: Check, model: Path, tmp_path: Path) -> None:
    folder = changed(model, tmp_path / "other", num_attention_heads="2", rms_norm_eps=-1)
    (found,) = check(f"hf_checkpoint={folder}")
    assert found.endswith(
        "num_attention_heads must be a positive integer, not '2'; rms_norm_eps must be a positive number, not -1"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "generation_config.json is not a JSON object"),
        ("{", "generation_config.json is not valid JSON"),
        ('{"eos_token_id": "x"}', "eos_token_id must be a token's number or a list of them, not 'x'"),
    ],
)
def test_a_generation_config_is_read(check: Check, model: Path, tmp_path: Path, content: str, message: str) -> None:
    folder = changed(model, tmp_path / "other")
    (folder / "generation_config.json").write_text(content)
    (found,) = check(f"hf_checkpoint={folder}")
    assert message in found


@pytest.mark.parametrize("template", [3, [{"name": "default"}], ["x"], {"default": 1}])
def test_a_chat_template_that_is_no_text(check: Check, model: Path, tmp_path: Path, template: Any) -> None:
    folder = changed(model, tmp_path / "other")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": template}))
    (found,) = check(f"hf_checkpoint={folder}")
    assert "tokenizer_config.json: chat_template is neither text nor a list of named texts" in found


def test_a_file_whose_rows_are_all_too_long(check: Check, tmp_path: Path) -> None:
    long, short = {"prompt": "long " * 20, "label": "1"}, {"prompt": "short", "label": "1"}
    limits = "rollout_max_prompt_len=9", "drop_long_prompts=true"
    few = rows(tmp_path / "few.jsonl", *[long] * 3, short)
    (found,) = check(f"prompt_data={few}@[:3]", *limits)
    assert found == f"data.prompt_data: {few}@[:3]: no rows; check the file, its slice and data.drop_long_prompts"
    assert check(f"prompt_data={few}", *limits) == []
    many = rows(tmp_path / "many.jsonl", *[long] * inputs.EXAMINED_ROWS, short)  # a good row further on
    assert check(f"prompt_data={many}", *limits) == []


def test_a_token_that_the_model_lacks(check: Check, model: Path, tmp_path: Path) -> None:
    """As when tokens were added to a tokenizer, and no rows to the embedding."""
    folder = changed(model, tmp_path / "other")
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_tokens([f"<extra{number}>" for number in range(200)])
    fast.save(str(folder / "tokenizer.json"))
    text = "a <extra199>", "a <extra0>", "b"
    data = rows(tmp_path / "rows.jsonl", *({"prompt": one, "label": "1"} for one in text))
    (found,) = check(f"hf_checkpoint={folder}", f"prompt_data={data}")
    number = fast.token_to_id("<extra199>")
    assert f"{data}:1: token {number} ('<extra199>') is unknown to the model, whose vocab_size is 512" in found


def test_a_label_that_no_row_has_is_one_error(check: Check) -> None:
    (found,) = check("label_key=none", "rm_type=exact")
    assert "the label None is neither a string" in found
    assert found.endswith("name the labels' column (label_key), or another reward (rm_type)")
    own = "environment.environment=tests.environments.samples:rewarded"  # which may give all rewards
    assert check("label_key=none", "rm_type=exact", own) == []


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
    assert documented - {s for s in documented if ".N." in s} == {
        *inputs.PROTOCOLS,
        "data.prompt_data",
        "reward.rm_type",
        "environment.environment",
    }


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


# --- a judge ----------------------------------------------------------------------------------------------------------


def test_a_judge_is_examined_as_the_model_is(check: Check, model: Path, tmp_path: Path) -> None:
    given = ["rm_type=judge", "judge_prompt={response}", "judge_num_gpus=1", "judge_arguments={max_tokens=8}"]
    assert check(*given, f"judge_hf_checkpoint={model}") == []
    setting = "reward.judge_hf_checkpoint"
    assert f"{setting}: no folder gone" in check(*given, "judge_hf_checkpoint=gone")
    folder = tmp_path / "other"
    shutil.copytree(model, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (found,) = check(*given, f"judge_hf_checkpoint={folder}")
    assert found == f"{setting}: {folder} has no chat template, by which the judge is asked: add chat_template.jinja"
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    (found,) = check(*given, f"judge_hf_checkpoint={folder}")
    assert found == f"{setting}: the chat template rejects this conversation: no users here"
    (folder / "tokenizer.json").unlink()
    (found,) = check(*given, f"judge_hf_checkpoint={folder}")
    assert found.startswith(f"{setting}: {folder}/tokenizer.json does not exist")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert f"{setting}: {folder}: tensor model.norm.weight is missing" in check(*given, f"judge_hf_checkpoint={folder}")
    (found,) = check(*given[:-1], f"judge_hf_checkpoint={model}")
    assert found.startswith("reward.judge_arguments: max_tokens = 1024 leaves no room for a question in the judge's")
