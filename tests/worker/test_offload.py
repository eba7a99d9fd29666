"""A run whose trainer moves out for every rollout is the same run."""

from __future__ import annotations

from pathlib import Path

from miles_spmd.telemetry.trackers import METRICS_FILE, read_metrics
from tests import forked
from tests.worker.tiny_run import write_checkpoint, write_config


def train(folder: Path, checkpoint: Path, *overrides: str) -> list[dict[str, float]]:
    folder.mkdir(exist_ok=True)
    settings = {"reward": {"rm_type": "tests.worker.rewards:by_length"}, "megatron": {"lr": 1e-2}}
    config = write_config(folder, checkpoint, **settings)
    command = ["-m", "miles_spmd", "train", config, "--nproc-per-node=1", "save_interval=1", *overrides]
    done = forked.run(*command, folder=folder)
    assert done.returncode == 0, done.stderr
    steps = read_metrics(folder / "runs" / "tiny" / METRICS_FILE)
    return [{name: v for name, v in values.items() if name.startswith("train/")} for values in steps.values()]


def test_the_same_run(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model")
    plain = train(tmp_path / "plain", checkpoint)
    assert len(plain) == 4
    released = ["offload_train=true", "offload_rollout=all"]  # and the engine gives everything up
    assert train(tmp_path / "offloaded", checkpoint, *released) == plain
    # checkpoints were written whole: two more steps from step 1's are the same steps
    latest = tmp_path / "offloaded" / "runs" / "tiny" / "checkpoints" / "step_000001"
    resumed = train(tmp_path / "resumed", checkpoint, "offload_train=true", f"checkpoint.load={latest}")
    assert resumed[-2:] == plain[-2:]
