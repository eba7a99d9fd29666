"""The configurations we ship: complete, minimal, and what their names say."""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from miles_spmd.config import Config
from miles_spmd.config.backends import BACKENDS, backend_fields
from miles_spmd.config.checks import warnings
from miles_spmd.config.load import load_config
from miles_spmd.quickstart.assets import SUMS, build_assets
from tests import forked

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted((CONFIGS / "algorithms").glob("*.toml"))
# What a recipe is named after: these settings have these values, where all the other recipes' differ.
MEANING: dict[str, dict[str, Any]] = {
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
    "rae": {"advantage_estimator": "rae"},
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
def test_it_loads_and_nothing_in_it_needs_a_warning(path: Path) -> None:
    assert warnings(load_config(path, check_files=False)) == []


@pytest.mark.parametrize("path", [*RECIPES, *sorted((CONFIGS / "environments").glob("*.toml"))], ids=lambda p: p.stem)
def test_it_says_only_what_is_not_so_anyway(path: Path) -> None:
    config = load_config(path, check_files=False)
    for table, said in tomllib.loads(path.read_text()).items():
        if table in BACKENDS:
            fields = backend_fields(table)
            superfluous = [leaf for leaf, value in said.items() if value == fields[leaf].default]
        else:
            settings = getattr(config, table)
            superfluous = [
                leaf for leaf in said if getattr(settings, leaf) == type(settings).model_fields[leaf].default
            ]
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


# --- they run --------------------------------------------------------------------------------------------------------

AT_A_TIME = 2
ROWS = 64  # of each file: evaluations of 400 prompts were two fifths of the computing of all runs
Metrics = dict[str, float]
OWN_METRICS = {
    "ppo": ["train/critic_loss", "train/value_clipfrac", "rollout/value_explained_variance"],
    "rae": ["rollout/role/first/reward"],
    "opd": ["rollout/opd_reverse_kl"],
    "opd_top_k": ["rollout/opd_reverse_kl"],
    "opsm": ["train/opsm_masked"],
    **{name: ["rollout/tis_weight", "rollout/tis_rejected"] for name in ("tis", "mis", "icepop")},
    **{
        name: ["train/reward_accuracy", "train/reward_margin", "eval/heldout"]
        for name in ("dpo", "ipo", "simpo", "reward_model")
    },
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[list[Metrics]]]]:
    """Two steps of the recipes that are to be tested, some at a time, from a random model: name -> metrics."""
    folder = tmp_path_factory.mktemp("recipes")
    for task, name in ((SUMS, "quickstart"), ("stones", "stones")):
        root = folder / "runs" / name
        build_assets(root / "assets", name=task)
        for file in (root / "assets").glob("*.jsonl"):
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:ROWS]))
        for stage in ("sft", "grpo"):  # from whose exports the recipes start
            (root / stage).mkdir()
            (root / stage / "export").symlink_to(root / "assets" / "model")
    free_cpus: SimpleQueue[int] = SimpleQueue()
    for cpu in sorted(os.sched_getaffinity(0))[:AT_A_TIME]:
        free_cpus.put(cpu)

    def run(name: str) -> list[Metrics]:
        """On one core: several threads, as the worker would start, wait for each other on a busy machine."""
        path = CONFIGS / "algorithms" / f"{name}.toml"
        overrides = _small(load_config(path, check_files=False))
        arguments = ["-m", "miles_spmd", "train", path, "--nproc-per-node=1", *overrides]
        stdout, stderr = folder / f"{name}.stdout", folder / f"{name}.stderr"
        cpu = free_cpus.get()
        variables = os.environ | {"PYTHONPATH": str(CONFIGS.parent)}
        program = forked.start(arguments, folder, variables, stdout, stderr, cpus=[cpu])
        try:
            status = program.wait(100)
        finally:
            program.kill()
            free_cpus.put(cpu)
        assert status == 0, stdout.read_text() + stderr.read_text()
        lines = (folder / "runs" / "algorithms" / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    items: list[Any] = request.session.items
    wanted = [item.callspec.params["name"] for item in items if item.originalname == "test_it_runs"]
    pool = ThreadPoolExecutor(AT_A_TIME)
    yield {name: pool.submit(run, name) for name in wanted}
    pool.shutdown(cancel_futures=True)


def _small(config: Config) -> list[str]:
    """Overrides that leave a recipe what it is: its batches are small, its model may be as random as it is."""
    size = 32
    answers = min(config.rollout.n_samples_per_prompt, 4)
    overrides = [f"n_samples_per_prompt={answers}", f"rollout_batch_size={size // answers}"]
    if config.train.global_batch_size is not None:
        overrides.append(f"global_batch_size={size // 2}")
    return [
        *overrides,
        *("num_rollout=2", "lr_warmup_iters=0", f"num_critic_only_steps={min(config.train.num_critic_only_steps, 1)}"),
        *("rm_type=tests.recipe_run:coin", "reward_workers=1", "progress=none", "export_final=false"),
    ]


@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_it_runs(runs: dict[str, Future[list[Metrics]]], name: str) -> None:
    metrics = runs[name].result()
    assert [row["step"] for row in metrics] == [0, 1, 2]
    for row in metrics:
        assert all(math.isfinite(value) for value in row.values()), row
    last = metrics[-1]
    assert {"train/loss", *OWN_METRICS.get(name, [])} <= last.keys()
    assert last["train/grad_norm"] > 0
    assert last["train/skipped_steps"] == 0
