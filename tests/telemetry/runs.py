"""Run folders as a run leaves them, written by the code that runs use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from miles_spmd.config import Config
from miles_spmd.config.load import dump_config
from miles_spmd.telemetry.environment import write_environment
from miles_spmd.telemetry.trackers import open_trackers
from miles_spmd.telemetry.transcripts import write_rollout, write_transcripts
from miles_spmd.types.sample import Prompt, Sample
from tests.samples import sample_of


def make_config(output_dir: Path, **tables: dict[str, Any]) -> Config:
    base: dict[str, dict[str, Any]] = {
        "run": {"name": "grpo", "output_dir": output_dir, "num_rollout": 20},
        "model": {"hf_checkpoint": "checkpoint"},
        "data": {"prompt_data": "data.jsonl"},
        "telemetry": {"num_transcripts": 2},
    }
    return Config.model_validate({name: base.get(name, {}) | tables.get(name, {}) for name in {**base, **tables}})


def step_metrics(step: int) -> dict[str, float]:
    return {
        "rollout/raw_reward": 0.3 + step / 40,
        "rollout/reward_std": 0.2,
        "rollout/response_len": 12.0 - step / 4,
        "rollout/response_len_max": 24.0,
        "train/loss": 0.01,
        "train/kl_loss": step / 1000,
        "train/entropy_loss": 1.0 / step,
        "train/grad_norm": 1.5,
        "train/train_rollout_logprob_abs_diff": 2e-7,
        "train/train_rollout_logprob_abs_diff_max": 3e-6,
        "parity/tokens": 768.0,
        "parity/mismatches": 2.0,
        "refit/checksum_mismatches": 0.0,
        "perf/rollout_time": 0.6,
        "perf/train_time": 0.5,
        "perf/refit_time": 0.1,
        "perf/step_time": 1.25,
    }


def make_run(config: Config, steps: int) -> None:
    """A run of ``steps`` steps with an evaluation at both ends."""
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.toml").write_text(dump_config(config))
    write_environment(config.run_dir, "train")
    with open_trackers(config) as tracker:
        tracker.log(0, {"eval/sums": 0.25, "eval/sums-pass@4": 0.5, "perf/start_time": 7.5, "perf/step_time": 8.0})
        write_transcripts(config, 0, {"sums": [[sample("3", reward=0.0)]]})
        for step in range(1, steps + 1):
            tracker.log(step, step_metrics(step))
            write_rollout(config, step, [[sample("low", reward=0.0), sample("high", reward=step / 10)]])
        tracker.log(steps, {"eval/sums": 0.75, "eval/sums-pass@4": 0.8})
        write_transcripts(config, steps, {"sums": [[sample("4", reward=1.0)]]})


def sample(text: str, reward: float) -> Sample:
    prompt = Prompt("sums:0", "two plus two & <script>document.title = 'broken'</script>", [5, 6], label=4)
    return sample_of(prompt, 0, [7], text=f"<i>{text}</i>", reward=reward)
