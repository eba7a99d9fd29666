"""Metrics as they reach files."""

from __future__ import annotations

import json
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from miles_spmd.algorithms.advantages import compute_advantages
from miles_spmd.algorithms.corrections import mis, mismatch_metrics
from miles_spmd.config import AlgorithmConfig
from miles_spmd.controller.journal.stragglers import AMOUNTS
from miles_spmd.telemetry import metrics
from miles_spmd.telemetry.json_lines import LineWriter
from miles_spmd.telemetry.metrics import METRICS, PHASES, describe, is_score, phase_times
from miles_spmd.telemetry.trackers import JsonlTracker, open_trackers, read_metrics
from miles_spmd.types.engine_group import JUDGE
from miles_spmd.types.phase import Phase
from miles_spmd.types.rollout_batch import RolloutBatch
from tests.telemetry.runs import make_config


def test_one_object_per_call_with_nothing_json_cannot_say(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "deep" / "metrics.jsonl")
    tracker.log(1, {"train/loss": 0.5, "train/grad_norm": float("nan"), "perf/step_time": float("inf")})
    tracker.log(2, {"train/loss": 0.25})
    tracker.close()

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    lines = (tmp_path / "deep" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["train/loss"] == 0.5
    assert rows[0]["train/grad_norm"] is None
    assert rows[0]["time"] <= rows[1]["time"]


def test_a_killed_run_leaves_every_step_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from miles_spmd.telemetry.trackers import JsonlTracker\n"
        "tracker = JsonlTracker(Path(sys.argv[1]))\n"
        "for step in range(5): tracker.log(step, {'train/loss': 1.0 / (step + 1)})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(read_metrics(path)) == [0, 1, 2, 3, 4]

    with path.open("ab") as file:
        file.write(b'{"step": 5, "train/lo')  # killed within a line
    tracker = JsonlTracker(path)
    tracker.log(4, {"train/loss": 9.0, "eval/sums": 0.5})
    tracker.log(5, {"train/loss": 8.0})
    tracker.close()
    steps = read_metrics(path)
    assert list(steps) == [0, 1, 2, 3, 4, 5]
    assert (steps[3]["train/loss"], steps[4]["train/loss"], steps[4]["eval/sums"]) == (0.25, 9.0, 0.5)


def test_a_resumed_run_names_lines_that_were_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    for step in range(6):
        tracker.log(step, {"train/loss": 0.5})
    tracker.close()
    JsonlTracker(path).close()
    assert capsys.readouterr().err == ""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], lines[3][:20], *lines[4:], b'{"step": 6, "trai']))
    JsonlTracker(path).close()
    cut, missing = capsys.readouterr().err.splitlines()
    assert f"warning: {path}: 2 of 6 lines cannot be read: line 4, 6; the last one is incomplete" in cut
    assert f"warning: {path}: has no metrics of 2 steps: 3 to 4; the run goes on and appends" in missing
    assert path.read_bytes().endswith(lines[5])


def test_a_full_disk_ends_the_run(tmp_path: Path) -> None:
    """At most one line is cut: no later one is appended to its rest."""
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from miles_spmd.telemetry.trackers import JsonlTracker\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "tracker = JsonlTracker(Path(sys.argv[1]))\n"
        "for step in range(100): tracker.log(step, {'train/loss': 0.5})\n"
    )
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "OSError: [Errno 27]" in done.stderr
    assert list(read_metrics(path)) == list(range(path.read_bytes().count(b"\n")))


@pytest.mark.parametrize("rest", [b"{", b'{"step": 1}', b""])
def test_an_incomplete_line_gives_way_to_the_next(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    for start in (b"", b'{"step":0}\n'):
        path.write_bytes(start + rest)
        lines = LineWriter(path)
        lines.write({"step": 7})
        lines.close()
        assert path.read_bytes() == start + b'{"step":7}\n'


def tensorboard_scalars(file: Path) -> dict[tuple[str, int], float]:
    """Read with TensorBoard's own record format: length, its checksum, an Event, its checksum."""
    data, position, scalars = file.read_bytes(), 0, {}
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        event = Event.FromString(data[position + 12 : position + 12 + length])
        scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        position += 12 + length + 4
    return scalars


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    config = make_config(tmp_path, telemetry={"use_tensorboard": True})
    with open_trackers(config) as tracker:
        tracker.log(1, {"train/loss": 0.5, "train/grad_norm": float("nan")})
        tracker.log(2, {"train/loss": 0.25})
    (file,) = (config.run_dir / "tensorboard").iterdir()
    assert tensorboard_scalars(file) == {("train/loss", 1): 0.5, ("train/loss", 2): 0.25}
    assert list(read_metrics(config.run_dir / "metrics.jsonl")) == [1, 2]


def test_wandb_without_the_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(RuntimeError, match=r"pip install 'miles-spmd\[wandb\]'"),
        open_trackers(make_config(tmp_path, telemetry={"use_wandb": True})),
    ):
        pass


def algorithm_metrics() -> set[str]:
    """Names that the algorithms choose, from running them."""
    ones = [np.ones(4)] * 4
    batch = RolloutBatch(
        *(np.arange(4.0), np.zeros(4, int), ones),
        **dict.fromkeys(("old_log_probs", "rollout_log_probs", "teacher_log_probs", "values"), ones),
    )
    correction = mis(batch, AlgorithmConfig(use_tis=True, tis_function="mis"))
    return {f"train/{name}" for name in mismatch_metrics(ones, ones, ones)} | {
        f"rollout/{name}"
        for algorithm in (AlgorithmConfig(opd_kl_coef=0.1), AlgorithmConfig(advantage_estimator="ppo"))
        for name in compute_advantages(batch, algorithm).metrics | correction.metrics
    }


def test_every_metric_that_is_written_is_described_and_the_reverse() -> None:
    controller = Path(metrics.__file__).parents[1] / "controller"
    source = "".join(path.read_text() for path in controller.rglob("*.py"))
    phases = set(re.findall(r'\.timed\("(\w+)", ', source))
    tables = "rollout|train|refit|parity|perf|checkpoint|health"
    written = set(re.findall(rf'"((?:{tables})/\w+)"', source)) | algorithm_metrics()
    written |= {f"perf/{phase}_slowest" for phase in AMOUNTS}
    workers = "".join(path.read_text() for path in controller.with_name("worker").rglob("*.py"))
    memory = {*re.findall(r'\.note\("(\w+)"', workers), *set(Phase) - {Phase.IDLE, Phase.STOP}}
    written |= {f"memory/{name}" for name in memory}
    written |= {f"memory/{JUDGE}_{name}" for name in ("start", Phase.ROLLOUT, "rollout_retries")}
    building = "".join((controller.with_name("worker") / name).read_text() for name in ("main.py", "worker.py"))
    parts = {*re.findall(r'\bwatch\("(\w+)"', building), "refit_plan"}  # of the start
    written |= {f"start/{name}" for name in (*parts, "total")}
    assert set(METRICS) == written | {f"perf/{phase}_time" for phase in phases}
    assert set(PHASES) == phases


def test_names() -> None:
    assert describe("train/grad_norm") is METRICS["train/grad_norm"]
    assert describe("eval/gsm8k").meaning == "Mean score (pass@1) on gsm8k"
    assert describe("eval/math-500-pass@8").meaning == "Prompts of math-500 solved by one of 8 responses"
    assert is_score("eval/math-500")
    assert not is_score("eval/math-500-pass@8")
    assert not is_score("eval/math-500-response_len")
    assert not is_score("eval/pairs-margin")
    assert not is_score("rollout/raw_reward")
    assert phase_times({"perf/train_time": 2.0, "perf/rollout_time": 1.0, "perf/step_time": 4.0}) == {
        "rollout": 1.0,
        "train": 2.0,
    }
