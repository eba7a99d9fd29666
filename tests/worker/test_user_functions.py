"""A run whose rewards or filters raise, exit, hang or return nonsense: one line names them, and the row."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.worker.launched import START_SECONDS, Launch


def test_a_raising_reward_is_named(launch: Launch) -> None:
    run = launch(reward={"rm_type": "tests.worker.rewards:raises"})
    message = run.finish(START_SECONDS)
    assert message.startswith("rollout, step 0: RewardError: ")
    assert "no such answer" in run.stderr()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reward_that_exits_is_named(launch: Launch, workers: int) -> None:
    run = launch(reward={"rm_type": "tests.worker.rewards:exits", "reward_workers": workers})
    message = run.finish(START_SECONDS)
    assert message.startswith("rollout, step 0: RewardError: reward 'tests.worker.rewards:exits' on prompt data.jsonl:")
    assert re.search(r"sample [01], called sys\.exit\(1\)", message)  # two processes may fail in any order


def test_a_filter_that_exits_is_named(launch: Launch) -> None:
    name = "tests.worker.rewards:filter_that_exits"
    message = launch(algorithm={"dynamic_sampling_filter": name}).finish(START_SECONDS)
    assert f"rollout, step 0: PlugInError: algorithm.dynamic_sampling_filter = {name!r} called sys.exit(0)" in message


def test_a_filter_that_hangs_is_named(launch: Launch) -> None:
    name = "tests.worker.rewards:filter_that_hangs"
    settings = {"algorithm": {"dynamic_sampling_filter": name}, "deadlines": {"train_timeout": 1.0}}
    message = launch(**settings).finish(START_SECONDS)
    assert f"algorithm.dynamic_sampling_filter = {name!r} took longer than deadlines.train_timeout = 1 s" in message


def test_a_label_that_the_reward_cannot_read_is_named_before_anything_starts(launch: Launch, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{i} plus 1", "answer": str(i + 1)} for i in range(16)]
    rows[7]["answer"] = None
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"prompt_data": str(tmp_path / "bad.jsonl"), "label_key": "answer"}
    run = launch(data=data, reward={"rm_type": "math"})
    assert run.finish(START_SECONDS).endswith("config.toml: 1 error")
    expected = "bad.jsonl:8: the label None is neither a string nor a number (reward 'math'); correct it"
    assert expected in run.stderr()
    assert not (run.run_dir / "metrics.jsonl").exists() or not (run.run_dir / "metrics.jsonl").read_text()


def test_a_reward_that_is_no_number_is_named(launch: Launch) -> None:
    message = launch(reward={"rm_type": "tests.worker.rewards:not_a_number"}).finish(START_SECONDS)
    assert message.startswith("rollout, step 0: RewardError: ")
    assert "nan" in message


def test_equal_rewards_teach_nothing_and_stop_nobody(launch: Launch) -> None:
    run = launch(reward={"rm_type": "tests.worker.rewards:constant"}, run={"num_rollout": 2})
    assert run.launcher.wait(START_SECONDS) == 0, run.report()
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    assert len(steps) == 2
    for row in steps:
        assert (row["train/loss"], row["train/grad_norm"], row["train/skipped_steps"]) == (0, 0, 0)
        assert row["rollout/zero_std_groups"] == 4


def test_a_filter_that_leaves_nothing_skips_the_update(launch: Launch) -> None:
    filtering = {"dynamic_sampling_filter": "reward_nonzero_std"}
    run = launch(reward={"rm_type": "tests.worker.rewards:constant"}, algorithm=filtering, run={"num_rollout": 2})
    assert run.launcher.wait(START_SECONDS) == 0, run.report()
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert not any("train/loss" in row for row in rows)
    assert [row["rollout/dropped_groups"] for row in rows if "rollout/dropped_groups" in row] == [36, 36]
    assert "0 of 36 groups were kept, of which 4 are needed; dropped: 36 with all rewards" in run.report()


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", ["run.phase_hook", "train.packing", "train.trainer_hook", "telemetry.tracker", "checkpoint.exporter"]
)
def test_a_plug_in_that_raises_ends_the_run_with_its_name(launch: Launch, setting: str) -> None:
    table, _, name = setting.partition(".")
    function = "tests.worker.rewards:plug_in_that_raises"
    changes: dict[str, dict[str, Any]] = {"run": {"num_rollout": 1}, "checkpoint": {"export_final": True}}
    changes[table] = changes.get(table, {}) | {name: function}
    run = launch(**changes)
    assert f"PlugInError: {setting} = {function!r} raised KeyError: 'gone'" in run.finish(START_SECONDS)
    if name == "exporter":  # it comes last, and nothing is lost
        assert (run.run_dir / "export" / "config.json").exists()
        assert len((run.run_dir / "metrics.jsonl").read_text().splitlines()) == 2
