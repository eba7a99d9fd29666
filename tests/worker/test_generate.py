"""`miles-spmd generate`, with real processes and SGLang: rollouts without a trainer."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from miles_spmd.config import Config
from miles_spmd.controller.run_folder import RunFolderError, of_task
from miles_spmd.ledger import step_data
from miles_spmd.telemetry.responses import RESPONSES_FILE, ResponseRow
from tests import forked
from tests.worker.tiny_run import write_config

STEPS, MANY = 3, 100


def rows(folder: Path) -> list[ResponseRow]:
    lines = (folder / "runs" / "tiny-generate" / RESPONSES_FILE).read_bytes().splitlines()
    return [msgspec.json.decode(line, type=ResponseRow) for line in lines]


def generate(folder: Path, config: Path, *overrides: str, ranks: int = 1) -> Any:
    command = ["-m", "miles_spmd", "generate", str(config), f"--nproc-per-node={ranks}"]
    return forked.run(*command, *overrides, folder=folder, timeout=200)


def test_it_generates_what_training_begins_with(tmp_path: Path, checkpoint: Path) -> None:
    """Bitwise, whatever the number of engines."""
    config = write_config(tmp_path, checkpoint)
    train = ["-m", "miles_spmd", "train", str(config), "--nproc-per-node=2", "run.num_rollout=1"]
    done = forked.run(*train, folder=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    recorded = step_data.read(tmp_path / "runs" / "tiny", 0)
    assert recorded is not None
    assert recorded.samples is not None
    done = generate(tmp_path, config, ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"responses:  {tmp_path}/runs/tiny-generate/{RESPONSES_FILE}" in done.stdout
    found = rows(tmp_path)
    assert [row.step for row in found] == [step + 1 for step in range(STEPS) for _ in range(8)]
    first = [row for row in found if row.step == 1]
    samples = recorded.samples.samples(dict.fromkeys(recorded.samples.uids))  # type: ignore[arg-type]
    assert [row.tokens for row in first] == [sample.response for sample in samples]
    assert [row.log_probs for row in first] == [sample.rollout_log_probs for sample in samples]
    assert [row.reward for row in first] == [sample.reward for sample in samples]
    assert {len(row.loss_mask) - sum(row.loss_mask) for row in found} == {0}


def test_one_that_was_stopped_goes_on(tmp_path: Path, checkpoint: Path) -> None:
    config = write_config(tmp_path, checkpoint)
    steps = f"run.num_rollout={MANY}"
    output, errors = tmp_path / "stdout", tmp_path / "stderr"
    command = ["-m", "miles_spmd", "generate", str(config), "--nproc-per-node=1", steps]
    run = forked.start(command, tmp_path, {}, output, errors)
    file = tmp_path / "runs" / "tiny-generate" / RESPONSES_FILE
    end = time.monotonic() + 120
    while not (file.exists() and file.stat().st_size):
        assert run.poll() is None, errors.read_text()
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(60) == 75, errors.read_text()
    assert "the responses of the steps before are written" in errors.read_text()
    before = rows(tmp_path)
    assert 0 < len(before) < 8 * MANY
    again = generate(tmp_path, config, steps)
    assert again.returncode == 2
    assert "checkpoint.resume=true to continue it" in again.stderr
    again = generate(tmp_path, config, steps, "checkpoint.resume=true")
    assert again.returncode == 0, again.stderr
    found = rows(tmp_path)
    assert found[: len(before)] == before
    assert [row.step for row in found] == [step + 1 for step in range(MANY) for _ in range(8)]


def test_what_is_missing_is_generated_again(tmp_path: Path, checkpoint: Path) -> None:
    """One greedy response to each prompt, of which training would learn nothing; then half of the file is lost."""
    config = write_config(tmp_path, checkpoint)
    settings = "rollout.rollout_temperature=0", "n_samples_per_prompt=1", "determinism.deterministic=true"
    done = generate(tmp_path, config, *settings)
    assert done.returncode == 0, done.stderr
    before, file = rows(tmp_path), tmp_path / "runs" / "tiny-generate" / RESPONSES_FILE
    os.truncate(file, file.stat().st_size // 2)
    done = generate(tmp_path, config, *settings, "checkpoint.resume=true")
    assert done.returncode == 0, done.stderr
    assert f"{RESPONSES_FILE}: responses of the {STEPS} steps that were done are missing" in done.stderr
    assert "other settings" not in done.stderr
    assert rows(tmp_path) == before
    others = "rollout.rollout_max_response_len=3", f"run.num_rollout={STEPS + 1}"
    done = generate(tmp_path, config, *settings, "checkpoint.resume=true", *others)
    assert done.returncode == 0, done.stderr
    assert f"step {STEPS} on are generated with other settings" in done.stderr
    assert "before: rollout.rollout_max_response_len;" in done.stderr
    assert rows(tmp_path)[: len(before)] == before


def test_without_labels_nothing_is_scored(tmp_path: Path, checkpoint: Path) -> None:
    config = write_config(tmp_path, checkpoint)
    (tmp_path / "data.jsonl").write_text('{"prompt": "Say something."}\n{"prompt": "Say more."}\n')
    refused = generate(tmp_path, config)
    assert refused.returncode == 2
    assert "data.label_key, to ''" in refused.stderr
    done = generate(tmp_path, config, "data.label_key=''", "run.num_rollout=1")
    assert done.returncode == 0, done.stderr
    assert {(row.reward, row.label) for row in rows(tmp_path)} == {(None, None)}
    assert "reward" not in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": {"load": "runs/a/checkpoints/step_000001"}}, "checkpoint.load: no rank trains here"),
        ({"run": {"mode": "sft"}}, "run.mode: responses are generated in mode 'rl', not 'sft'"),
    ],
)
def test_what_has_no_meaning_is_refused(changes: dict[str, Any], message: str) -> None:
    config = Config(model={"hf_checkpoint": "none"}, data={"prompt_data": "none"}, **changes)
    with pytest.raises(RunFolderError, match=re.escape(message)):
        of_task(config, "generate")
