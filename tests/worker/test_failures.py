"""A run in which something hangs or raises: one clear line, a status of not 0, no process left, no long wait.

Real launcher, real processes. A run is held in a known phase by tests/worker/held.py, or by a reward that hangs, and
then hurt.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from miles_spmd.types.phase import Phase
from tests.worker.launched import START_SECONDS, Launch


@pytest.mark.parametrize("engines", [0, 1], ids=["colocated", "disaggregated"])
def test_without_a_failure_all_is_quiet(launch: Launch, engines: int) -> None:
    run = launch(rollout={"rollout_num_gpus": engines})
    assert run.launcher.wait(START_SECONDS) == 0, run.report()
    assert "miles-spmd: " not in run.stderr()
    assert not run.processes()
    metrics = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 3
    assert not (run.run_dir / "logs" / "latest" / "controller.log").exists()


# --- somebody stops it -----------------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_run(launch: Launch) -> None:
    run = launch(reward={"rm_type": "tests.worker.rewards:hangs", "reward_workers": 1})
    run.wait_until_held()
    os.killpg(run.launcher.pid, signal.SIGINT)  # as a terminal does
    assert run.finish() == "rollout, step 0: stopped by SIGINT"
    assert "Traceback" not in run.stderr()
    assert run.launcher.returncode == 128 + signal.SIGINT


def test_ctrl_c_leaves_a_report_and_says_how_to_go_on(launch: Launch) -> None:
    run = launch(run={"num_rollout": 10000}, checkpoint={"export_final": False, "save_interval": 1})
    run.wait_for_steps(3)
    os.killpg(run.launcher.pid, signal.SIGINT)
    assert "stopped by SIGINT" in run.finish()
    said = (run.folder / "stdout").read_text()
    assert f"report:     {run.run_dir}/report.html\n" in said
    assert (run.run_dir / "report.html").is_file()
    assert f"checkpoint: {run.run_dir}/checkpoints/step_0" in said
    assert f"miles-spmd train {run.run_dir}/config.toml checkpoint.resume=true --nproc-per-node 2\n" in said
    assert len(run.stderr().splitlines()) == 1  # no library speaks


# --- something raises or hangs ---------------------------------------------------------------------------------------


def test_an_exception_in_a_worker_is_named(launch: Launch) -> None:
    run = launch(Phase.TRAIN, 1, "raise")
    message = run.finish(START_SECONDS)
    assert message.startswith("rank 1 (")
    assert "train, step 0: RuntimeError: the deed is done (traceback in " in message
    assert 'raise RuntimeError("the deed is done")' in (run.run_dir / "logs" / "latest" / "controller.log").read_text()


@pytest.mark.parametrize(("phase", "helps"), [(Phase.TRAIN, "train.max_tokens_per_gpu"), (Phase.ROLLOUT, "sglang.")])
def test_a_want_of_memory_is_explained(launch: Launch, phase: Phase, helps: str) -> None:
    run = launch(phase, 1, "exhaust")  # the other rank waits for it in a collective
    message = run.finish(START_SECONDS)
    assert message.startswith("rank 1 (")
    assert f"{phase}, step 0: DeviceMemoryError: no memory left on the host: [enforce fail" in message
    assert "; held: other tensors" in message
    assert f"What helps: {'lower' if phase is Phase.TRAIN else 'set'} {helps}" in message


def test_too_little_memory_is_said_at_the_start(launch: Launch) -> None:
    """What is only estimated is a warning, and the run goes on."""
    run = launch(train={"max_tokens_per_gpu": 2**40})
    assert run.launcher.wait(START_SECONDS) == 0, run.report()
    (warning,) = [line for line in run.stderr().splitlines() if line.startswith("miles-spmd: ")]
    assert warning.startswith("miles-spmd: warning: rank 0 (")
    assert "training takes at least" in warning
    assert "What helps: lower train.max_tokens_per_gpu" in warning
    for rank in (0, 1):
        assert "warning: training takes at least" in (run.run_dir / "logs" / "latest" / f"rank-{rank}.log").read_text()
    metrics = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 3


def test_an_exception_at_the_start_is_named(launch: Launch, checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.ones(512, 32)}, other / "model.safetensors")  # the model ties them
    message = launch(model={"hf_checkpoint": str(other), "dtype": "float32"}).finish(START_SECONDS)
    assert message.startswith("rank ")
    assert "start: HuggingFaceCheckpointError: " in message


def test_a_missed_deadline_ends_the_run_with_stacks(launch: Launch) -> None:
    run = launch(Phase.TRAIN, 1, "hang", deadlines={"train_timeout": 2.0})
    run.wait_until_held()
    message = run.finish()
    assert message == "train, step 0: rank 0, 1 did not reply within 2 s"
    report = run.stderr()
    assert "do_deed (held.py:" in report  # where rank 1 is
    assert "rank 0 (" in report
    assert "do_deed" in (run.run_dir / "logs" / "latest" / "rank-1.stacks").read_text()
    assert "all_reduce" in (run.run_dir / "logs" / "latest" / "rank-0.stacks").read_text()  # where it waits for rank 1
