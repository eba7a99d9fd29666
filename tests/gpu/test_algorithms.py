"""Runs with more models than a policy, on a GPU: a critic, a teacher, a reference, a reward model. They learn too."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles_spmd.quickstart.__main__ import CONFIGS
from tests.gpu import machine
from tests.gpu.test_grpo import grpo, series, train

STEPS = 15


@pytest.fixture(scope="module")
def teacher(warm: Path) -> Path:
    grpo(warm, "teacher", 1, 20, "model.dtype=bfloat16")
    return warm / "teacher" / "export"


def run(warm: Path, recipe: str, *overrides: str) -> dict[int, dict[str, float]]:
    """A recipe on the warmed-up model, bf16."""
    pairs = recipe in ("dpo", "reward_model")
    data, held_out = ("preferences", "heldout_preferences") if pairs else ("train", "heldout")
    steps = 128 if pairs else STEPS
    metrics = train(
        CONFIGS / "algorithms" / f"{recipe}.toml",
        warm,
        recipe,
        1,
        f"model.hf_checkpoint={warm}/sft/export",
        "model.dtype=bfloat16",
        f"data.prompt_data={warm}/assets/{data}.jsonl",
        f'eval.eval_prompt_data={{ heldout = "{warm}/assets/{held_out}.jsonl" }}',
        f"run.num_rollout={steps}",
        f"eval.eval_interval={steps}",
        *([] if pairs else (f"sglang.{key}={value}" for key, value in machine.ENGINE.items())),
        *overrides,
    )
    scores = series(metrics, "eval/heldout")
    machine.measured(
        f"{recipe}, one GPU, bf16, {steps} steps",
        {
            "held out, before": scores[0],
            "held out, after": scores[-1],
            "step, s": sorted(series(metrics, "perf/step_time"))[len(metrics) // 2],
        },
    )
    assert scores[-1] > scores[0] + 0.05
    return metrics


@machine.needs(1)
def test_ppo(warm: Path) -> None:
    metrics = run(warm, "ppo", "num_critic_only_steps=2")
    losses = series(metrics, "train/critic_loss")
    assert losses[-1] < 0.7 * losses[0]
    assert max(series(metrics, "rollout/value_explained_variance")) > 0.1  # it falls again when all answers are right
    assert "train/loss" not in metrics[1]
    assert "train/loss" in metrics[3]


@machine.needs(1)
@pytest.mark.parametrize("recipe", ["opd", "opd_top_k"])
def test_distillation(warm: Path, teacher: Path, recipe: str) -> None:
    distance = series(run(warm, recipe, f"model.teacher_load={teacher}"), "rollout/opd_reverse_kl")
    assert distance[-1] < 0.7 * distance[0]


@machine.needs(1)
@pytest.mark.parametrize("recipe", ["dpo", "reward_model"])
def test_pairs(warm: Path, recipe: str) -> None:
    run(warm, recipe)
