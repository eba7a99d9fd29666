"""Reading, overriding, checking and writing configurations."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_spmd.config import Config
from miles_spmd.config.load import ConfigError, config_digest, dump_config, load_config, parse
from miles_spmd.config.table import ENTRY, walk

MINIMAL = """
[model]
hf_checkpoint = "{checkpoint}"
[data]
prompt_data = "{data}"
[megatron]
lr = 1e-4
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A valid configuration whose checkpoint is a dense model of 4 layers, 4 heads and 2 key-value heads."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    shape = {
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "intermediate_size": 96,
        "max_position_embeddings": 2048,
    }
    (checkpoint / "config.json").write_text(json.dumps(shape))
    (checkpoint / "model.safetensors").touch()
    data = tmp_path / "data.jsonl"
    data.touch()
    file = tmp_path / "recipe.toml"
    file.write_text(MINIMAL.format(checkpoint=checkpoint, data=f"{data}@[0:10]"))
    return file


def errors(file: Path, *overrides: str, world_size: int | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(file, overrides, world_size=world_size)
    return error.value.errors


def test_overrides_by_path_by_leaf_and_by_backend(recipe: Path) -> None:
    config = load_config(
        recipe,
        [
            "rollout.rollout_batch_size=4",
            "n_samples_per_prompt=2",
            "rollout_stop=['a', 'b']",
            "eval_prompt_data.math=" + str(recipe),
            "name=7",  # a setting of text takes any text
            "label_key=none",
            "rm_type=my.module:function",
            "megatron.lr=3e-5",
            "sglang.tp_size=2",
            "n_samples_per_prompt=3",  # the later one counts
        ],
    )
    assert (config.rollout.rollout_batch_size, config.rollout.n_samples_per_prompt) == (4, 3)
    assert config.rollout.rollout_stop == ["a", "b"]
    assert config.eval.eval_prompt_data == {"math": str(recipe)}
    assert config.run.name == "7"
    assert config.data.label_key is None
    assert config.reward.rm_type == "my.module:function"
    assert config.megatron == {"lr": 3e-5}
    assert config.sglang == {"tp_size": 2}


def test_all_errors_come_at_once(recipe: Path) -> None:
    recipe.write_text(
        recipe.read_text() + "num_layers = 3\nrecompute_method = \"uniform\"\n[rolout]\nx = 1\n[run]\nseed = '3'\n"
    )
    found = errors(recipe, "rollout.rolout_top_p=1", "eval_interval=2", "n_samples_per_prompt", "lr=1")
    assert found == [
        "n_samples_per_prompt: an override is key=value",
        "lr=1: this is a key of [megatron]: write megatron.lr",
        "megatron.num_layers: cannot be set here: it is derived from the checkpoint's config.json",
        "run.seed: must be a valid integer, got '3'",
        "rollout.rolout_top_p: unknown key; did you mean rollout_top_p?",
        "rolout: unknown table; did you mean rollout?",
        "eval.eval_prompt_data: is empty, but eval_interval is 2",
        "megatron.recompute_method: needs recompute_granularity = 'full'",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rolout_batch_size=1", "unknown setting; did you mean rollout_batch_size?"),
        ("train.rollout_batch_size=1", "belongs in [rollout]"),
        ("train.clip_grad=1", "train.clip_grad: belongs in [megatron]"),
        ("rollout.attention_backend='triton'", "belongs in [megatron] or [sglang]"),
        ("rollout_stop=['a', '']", "rollout.rollout_stop.1: must be a text that is not empty"),
        ("rollout_stop_token_ids=[-1]", "rollout.rollout_stop_token_ids.0: must be greater than or equal to 0"),
        ("rollout_temperature=1e-9", "must be 0 or at least 1e-6, got 1e-09"),
        ("eval_temperature=1e-9", "must be 0 or at least 1e-6, got 1e-09"),
        ("rollout_batch_size='8'", "must be a valid integer, got '8'"),
        ("rollout_batch_size=8.5", "must be a valid integer"),
        ("rollout_batch_size=true", "must be a valid integer, got True"),
        ("rollout_batch_size=0", "must be greater than 0, got 0"),
        ("mode=grpo", "got 'grpo'"),
        ("rollout_shuffle=1", "must be a valid boolean"),
        ("rm_type=maths", "must be math, exact, f1, gpqa, code, remote, judge or `module:function`, got 'maths'"),
        ("seed=inf", "must be a valid integer"),
        ("rollout_timeout=inf", "must be a finite number"),
        ("rollout_stop_token_ids=[1, 'x']", "rollout.rollout_stop_token_ids.1: must be a valid integer, got 'x'"),
        ("megatron.tensor_model_parallel_size=2.0", "expected int, got float 2.0"),
        ("megatron.sequence_parallel=1", "expected bool, got int 1"),
        ("sglang.attention_backend=foo", "attention_backend: must be one of 'triton', 'torch_native'"),
        ("megatron.recompute_granularity=all", "must be one of 'full', 'selective', got 'all'"),
        ("megatron.tensor_paralel_size=2", "unknown key; did you mean"),
        ("megatron.bf16=true", "cannot be set here: set model.dtype instead"),
        ("sglang.model_path=x", "cannot be set here: set model.hf_checkpoint instead"),
        ("sglang.mem_fraction=0.5", "unknown key; did you mean mem_fraction_static?"),
        ("sglang.attention_backend=3", "expected str, got int 3"),
        ("sglang.tp_size=two", "expected int, got str 'two'"),
    ],
)
def test_one_error_is_the_only_one(recipe: Path, override: str, message: str) -> None:
    (found,) = errors(recipe, override)
    assert message in found


def test_required_settings_and_unreadable_files(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("[data]\ninput_key = 'x'\n")
    assert errors(file) == [
        "model: this table needs hf_checkpoint",
        "data.prompt_data: is missing and has no default",
    ]
    file.write_text("[data\n")
    assert "is not valid TOML" in errors(file)[0]
    assert "No such file" in errors(tmp_path / "absent.toml")[0]


def test_missing_files_are_named(recipe: Path, tmp_path: Path) -> None:
    found = errors(recipe, "hf_checkpoint=gone", "prompt_data=absent.jsonl@[0:3]", "ref_load=" + str(tmp_path))
    assert found == [
        "model.hf_checkpoint: no folder gone",
        f"model.ref_load: {tmp_path} has no readable config.json",
        f"model.ref_load: {tmp_path} has no safetensors files",
        "data.prompt_data: no file absent.jsonl",
    ]
    (found,) = errors(recipe, f"prompt_data={tmp_path}")
    assert found == f"data.prompt_data: {tmp_path} is a folder; name the file in it"
    load_config(recipe, ["hf_checkpoint=gone", "prompt_data=absent.jsonl"], check_files=False)


def test_a_dumped_config_loads_back_equal(recipe: Path, tmp_path: Path) -> None:
    config = load_config(
        recipe,
        ["label_key=none", "eps_clip_high=0.3", "eval_prompt_data.a=x", "megatron.lr=1", "sglang.tp_size=1"],
        check_files=False,
    )
    written = tmp_path / "written.toml"
    written.write_text(dump_config(config))
    again = load_config(written, check_files=False)
    assert again == config
    assert config_digest(again) == config_digest(config)
    assert config_digest(load_config(written, ["seed=1"], check_files=False)) != config_digest(config)
    # what the optimizer does where nobody has set it
    assert "# megatron.weight_decay = 0.01\n" in written.read_text()
    assert "megatron.lr =" not in written.read_text()


text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20).filter(lambda s: s != "none")


@settings(max_examples=60, deadline=None)
@given(
    label_key=st.none() | text,
    stop=st.lists(text.filter(bool), max_size=3),
    temperature=st.just(0.0) | st.floats(1e-6, 10),
    seed=st.integers(0, 2**63 - 1),
    name=st.text("aß7-. ", min_size=1, max_size=20).filter(lambda s: s.strip() == s and s not in (".", "..")),
    megatron=st.dictionaries(st.text("abc_", min_size=1), st.integers(-9, 9) | st.floats(-1, 1) | text | st.booleans()),
)
def test_dumping_loses_nothing(label_key, stop, temperature, seed, name, megatron) -> None:  # type: ignore[no-untyped-def]
    """Whatever text and numbers the settings hold; parsed by the schema alone, since the keys are made up."""
    import tomllib

    config = Config.model_validate(
        {
            "model": {"hf_checkpoint": "m"},
            "data": {"prompt_data": "d", "label_key": label_key},
            "rollout": {"rollout_stop": stop, "rollout_temperature": temperature},
            "run": {"seed": seed, "name": name},
            "megatron": megatron,
        }
    )
    assert parse(Config, tomllib.loads(dump_config(config))) == config


keys = st.sampled_from(
    ["run", "model", "rollout", "seed", "rollout_stop", "hf_checkpoint", "megatron", "lr", "sglang", "x"]
)
scalars = st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats(allow_nan=False) | text
documents = st.recursive(scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=4))


@settings(max_examples=150, deadline=None)
@given(document=st.dictionaries(keys, documents, max_size=4), overrides=st.lists(st.tuples(keys, text), max_size=2))
def test_whatever_is_written_is_accepted_or_refused(document, overrides) -> None:  # type: ignore[no-untyped-def]
    """A Config or a ConfigError, never another exception."""
    import tempfile

    import tomli_w

    def without_none(value):  # type: ignore[no-untyped-def]
        if isinstance(value, dict):
            return {key: without_none(v) for key, v in value.items() if v is not None}
        return [without_none(v) for v in value if v is not None] if isinstance(value, list) else value

    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(tomli_w.dumps(without_none(document)))
        file.flush()
        with contextlib.suppress(ConfigError):
            load_config(file.name, [f"{key}={value}" for key, value in overrides])


def test_every_name_of_a_setting_may_stand_alone() -> None:
    names = [setting.path[-1] for setting in walk(Config) if not setting.is_table and ENTRY not in setting.path]
    assert len(names) == len(set(names)) > 100
    assert {setting.path[0] for setting in walk(Config)} == set(Config.model_fields)


def test_every_shipped_recipe_loads() -> None:
    recipes = sorted((Path(__file__).parents[2] / "configs").rglob("*.toml"))
    assert recipes
    for file in recipes:
        load_config(file, check_files=False)


def test_configuration_needs_no_torch(recipe: Path) -> None:
    program = (
        "import sys; from miles_spmd.config.load import load_config; load_config(sys.argv[1]); "
        "print([m for m in ('torch', 'megatron.core', 'sglang', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(recipe)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
