"""The whole system learns: real trainer, real engine, two ranks, a reward that only learning can raise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from miles_spmd.quickstart.assets import build_assets
from tests import forked

REPOSITORY = Path(__file__).parents[2]

REWARD = """
def share_of_one_token(sample):
    return sample.response.count(5) / len(sample.response)
"""

RECIPE = """
[run]
name = "run"
output_dir = "."
num_rollout = 16
[model]
hf_checkpoint = "assets/model"
dtype = "float32"
[data]
prompt_data = "assets/train.jsonl"
apply_chat_template = true
[rollout]
rollout_batch_size = 8
n_samples_per_prompt = 8
rollout_max_response_len = 6
[reward]
rm_type = "one_token:share_of_one_token"
[train]
global_batch_size = 32
[algorithm]
kl_loss_coef = 0.001
[checkpoint]
export_final = false
[megatron]
lr = 5e-3
clip_grad = 1.0
use_distributed_optimizer = true
"""


def test_reward_rises(tmp_path: Path) -> None:
    build_assets(tmp_path / "assets")
    (tmp_path / "one_token.py").write_text(REWARD)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    command = ["-m", "miles_spmd", "train", "recipe.toml", "--nproc-per-node=2"]
    done = forked.run(*command, folder=tmp_path, environment={"PYTHONPATH": f"{REPOSITORY}:{tmp_path}"})
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["rollout/raw_reward"] for row in rows if "rollout/raw_reward" in row]
    assert len(rewards) == 16
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3
    # the engine was given the trainer's weights before every rollout: both compute the same bits as they change
    differences = [r["train/train_rollout_logprob_abs_diff_max"] for r in rows if "rollout/raw_reward" in r]
    assert max(differences) == 0
