"""What a user reads who wrote another system's names, impossible numbers, odd keys, or a file that is no text."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles_spmd.config import Config, checks
from miles_spmd.config.backends import BACKENDS, LIMITS, backend_fields
from miles_spmd.config.load import load_config
from miles_spmd.config.other_names import OTHER_NAMES
from miles_spmd.config.table import walk
from tests.config.test_load import errors, recipe  # noqa: F401  (a fixture)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # TRL and transformers
        ("learning_rate=1e-5", "here it is megatron.lr"),
        ("num_generations=8", "here it is rollout.n_samples_per_prompt"),
        ("max_completion_length=256", "here it is rollout.rollout_max_response_len"),
        ("beta=0.1", "here it is algorithm.kl_loss_coef (mode rl) or algorithm.dpo_beta (mode dpo)"),
        ("temperature=1", "here it is rollout.rollout_temperature"),
        ("per_device_train_batch_size=2", "here it is rollout.rollout_batch_size"),
        ("train.learning_rate=1", "here train.learning_rate is megatron.lr"),
        ("megatron.learning_rate=1", "here it is megatron.lr"),
        # veRL
        ("actor_rollout_ref.rollout.n=8", "here it is rollout.n_samples_per_prompt"),
        ("actor_rollout_ref.actor.optim.lr=1e-6", "write megatron.lr"),
        ("algorithm.adv_estimator=grpo", "is algorithm.advantage_estimator"),
        ("data.train_files=x", "is data.prompt_data"),
        ("trainer.total_epochs=3", "trainer.total_epochs is run.num_rollout"),
        # slime
        ("custom_rm_path=x", "here it is reward.rm_type"),
        ("model.path=x", "is model.hf_checkpoint"),
        ("train.optim=adamw", "is megatron.optimizer"),
        ("megatron.tp_size=2", "here it is megatron.tensor_model_parallel_size or sglang.tp_size"),
        # the beginning of a name, and of one of its words
        ("rollout_temp=1", "did you mean rollout_temperature?"),
        ("interval=3", "did you mean eval_interval or save_interval or"),
        # keys and values that cannot be meant
        ("rollout..x=3", "the key has an empty part"),
        ("eval_prompt_data.=x", "the key has an empty part"),
        ("hf_checkpoint=", "model.hf_checkpoint: must not be empty"),
        ("prompt_data=", "data.prompt_data: must not be empty"),
        ("eval_prompt_data=[]", "must be a table, got []"),
        ("rollout_stop={}", "must be a list, got {}"),
        # numbers with which nothing can run
        ("megatron.weight_decay=nan", "must be a finite number, got nan"),
        ("megatron.lr=inf", "must be a finite number, got inf"),
        ("megatron.lr=-1", "must be at least 0, got -1"),
        ("megatron.adam_beta2=1.0", "must be at least 0 and below 1, got 1.0"),
        ("megatron.tensor_model_parallel_size=0", "must be at least 1, got 0"),
        ("sglang.mem_fraction_static=7", "must be above 0 and below 1, got 7"),
        ("sglang.tp_size=-2", "must be at least 1, got -2"),
        ("seed=-1", "run.seed: must be greater than or equal to 0, got -1"),
        # a run's folder is in output_dir
        ("name=", "run.name: must be the name of a folder"),
        ("name=..", "run.name: must be the name of a folder"),
        ("name=../../x", "run.name: must be the name of a folder"),
        ("name=/tmp/x", "run.name: must be the name of a folder"),
        ("name=a\x1b[31m", "run.name: must be the name of a folder"),
        ("name=a\x00b", "run.name: must be the name of a folder"),
        ("name=" + 300 * "a", "run.name: must be the name of a folder: printable, without slashes, at most 200 bytes"),
        ("name=\udcff", "is not text in UTF-8"),
        ("output_dir=a\x00b", "run.output_dir: has control characters, got 'a\\x00b'"),
    ],
)
def test_one_message_says_what_to_write(recipe: Path, override: str, message: str) -> None:  # noqa: F811
    (found,) = errors(recipe, override)
    assert message in found


PATHS = ("run.output_dir", "model.hf_checkpoint", "model.ref_load", "checkpoint.export_dir", "checkpoint.load")
SOURCES = ("data.prompt_data", "eval.eval_prompt_data.one")


@pytest.mark.parametrize("setting", PATHS + SOURCES)
def test_paths_at_which_nothing_can_be_looked_up(recipe: Path, setting: str) -> None:  # noqa: F811
    circle = recipe.parent / "circle"
    circle.symlink_to(circle)
    for path, problem in (
        (str(circle), "cannot be used: Too many levels of symbolic links"),
        (f"{circle}/below", "cannot be used: Too many levels of symbolic links"),
        (300 * "a", "cannot be used: File name too long"),
        ("a\x00b", "has control characters"),
    ):
        source = path + "@[0:10]" if setting in SOURCES else path
        (found,) = errors(recipe, f"{setting}={source}")
        assert found.startswith(f"{setting}: {problem}, got ")


def test_numbers_beyond_what_a_machine_counts(recipe: Path) -> None:  # noqa: F811
    found = errors(recipe, "seed=9223372036854775808", "reward_timeout=1e7", "start_timeout=1e300")
    assert [line.partition(", got")[0] for line in found] == [
        "run.seed: must be less than 9223372036854775808",
        "reward.reward_timeout: must be less than or equal to 2000000",
        "deadlines.start_timeout: must be less than or equal to 2000000",
    ]


def test_an_evaluation_set_has_a_printable_name(recipe: Path) -> None:  # noqa: F811
    data = load_config(recipe).data.prompt_data
    (found,) = errors(recipe, f'eval.eval_prompt_data={{ "a\\nb" = "{data}" }}')
    assert found == "eval.sets: the name of an evaluation set must be printable text, got 'a\\nb'; rename it"
    (found,) = errors(recipe, 'eval.eval_prompt_data={ "a\\nb" = "" }')
    assert found == "eval.eval_prompt_data.a\nb: must not be empty"


def test_names_of_runs_and_of_the_folders_beside_them(recipe: Path) -> None:  # noqa: F811
    for name in ("grpo", "a b", "Größe_7.1", 200 * "a", 200 * "a" + "-replay-12", 200 * "a" + "-eval"):
        assert load_config(recipe, [f"name={name}"]).run.name == name


def test_a_table_of_another_system_is_translated(recipe: Path) -> None:  # noqa: F811
    recipe.write_text(recipe.read_text() + "[trainer]\ntotal_epochs = 3\n[trainer.deep]\nsave_freq = 2\nown = 1\n")
    (found,) = errors(recipe)
    assert found == (
        "trainer: unknown table; here trainer.total_epochs is run.num_rollout, in steps, "
        "trainer.deep.save_freq is checkpoint.save_interval"
    )


def test_other_names_lead_to_settings_that_exist() -> None:
    known = {s.dotted for s in walk(Config)} | {f"{table}.{key}" for table in BACKENDS for key in backend_fields(table)}
    for theirs, answer in OTHER_NAMES.items():
        first = answer.split(" ")[0].rstrip(",:;")
        assert first in known or answer.startswith("the option --"), theirs
        assert theirs not in known, theirs


def test_limits_are_of_keys_that_exist_and_hold_their_defaults() -> None:
    for table in BACKENDS:
        for holds, keys in LIMITS[table].values():
            for key in keys.split():
                default = backend_fields(table)[key].default
                assert default is None or holds(default), key


def test_a_file_that_is_no_text(recipe: Path) -> None:  # noqa: F811
    text = recipe.read_bytes()
    recipe.write_bytes(text + b"\n# \xff\n")
    line = text.count(b"\n") + 2
    assert errors(recipe) == [f"is not text in UTF-8: byte 0xff in line {line}; save it as UTF-8"]
    recipe.write_bytes(b"\xef\xbb\xbf" + text)
    load_config(recipe)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ("tis_clip=3", ["algorithm.tis_clip"]),
        ("use_tis=true tis_clip=3", []),
        ("use_tis=true rs_level=sequence", ["algorithm.rs_level"]),
        ("use_tis=true tis_function=mis tis_clip=3", ["algorithm.tis_clip"]),
        ("lambd=0.9 gamma=0.9", ["algorithm.lambd", "algorithm.gamma"]),
        ("advantage_estimator=ppo lambd=0.9 gamma=0.9 critic_lr=1e-5", []),
        ("critic_lr=1e-5", ["train.critic_lr"]),
        ("leaf_tokens=64", ["train.leaf_tokens"]),
        ("reduction_leaves=2 leaf_tokens=64", []),
        ("dpo_beta=0.5", ["algorithm.dpo_beta"]),
        ("mode=dpo dpo_beta=0.5 eps_clip=0.3", ["algorithm.eps_clip"]),
        ("mode=sft n_samples_per_prompt=2", ["rollout.n_samples_per_prompt"]),
        ("mode=sft reward_timeout=2", ["reward.reward_timeout"]),
        ("mode=sft reward_timeout=2 eval_interval=1 eval_prompt_data.a=x", []),
        ("eval_top_p=0.5", ["eval.eval_top_p"]),
        ("kl_loss_type=k1", ["algorithm.kl_loss_type"]),
        ("kl_coef=0.1 kl_loss_type=k1", []),
        ("export_final=false export_dir=x", ["checkpoint.export_dir"]),
        ("export_final=false exporter=a:b", ["checkpoint.exporter"]),
        ("exporter=a:b", []),
        ("curriculum=a:b rollout_shuffle=false", ["data.rollout_shuffle"]),
        ("evaluator=a:b", ["eval.evaluator"]),
        ("mode=dpo evaluator=a:b eval_interval=1 eval_prompt_data.a=x", ["eval.evaluator"]),
        ("mode=sft sample_filter=a:b", ["algorithm.sample_filter"]),
        ("judge_reader=a:b", ["reward.judge_reader"]),
        ("keep_every=10", ["checkpoint.keep_every"]),
        ("wandb_project=x", ["telemetry.wandb_project"]),
        ("environment_cache_share=2", ["environment.environment_cache_share"]),
        ("environment.environment=a:b environment_cache_share=2", []),
        (
            "environment_workers=4 environment_kwargs.rounds=4",
            ["environment.environment_workers", "environment.environment_kwargs"],
        ),
        ("environment.environment=a:b environment_workers=4 too_few_groups=stop", []),
        ("mode=sft environment.environment=a:b", ["environment.environment"]),
        ("mode=sft environment.environment=a:b eval_interval=1 eval_prompt_data.a=x", []),
        ("too_few_groups=stop", ["algorithm.too_few_groups"]),
        ("over_sampling_batch_size=64", ["rollout.over_sampling_batch_size"]),
        ("over_sampling_batch_size=64 acceptance=first_finished", []),
        ("service_requests=4", ["reward.service_requests"]),
        ("standby=true cell_restarts=9", ["resilience.standby", "resilience.cell_restarts"]),
        ("standby=true cell_restarts=9 cells=2 reduction_leaves=4", []),
    ],
)
def test_settings_without_effect_are_named(recipe: Path, overrides: str, named: list[str]) -> None:  # noqa: F811
    found = checks.warnings(load_config(recipe, overrides.split(), check_files=False))
    assert sorted(message.split(":")[0] for message in found) == sorted(named)
