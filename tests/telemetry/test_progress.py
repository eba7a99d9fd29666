"""Progress as it is printed: lines into a pipe, a bar on a real (pseudo) terminal."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from miles_spmd.telemetry import progress
from miles_spmd.telemetry.progress import open_progress
from miles_spmd.telemetry.texts import clock
from tests.telemetry.runs import make_config, step_metrics


def test_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with open_progress(make_config(tmp_path), file) as shown:
        for done in range(1, 21):
            now[0] += 0.5
            shown.update(done, step_metrics(done) | ({"eval/sums": 0.75} if done == 3 else {}))
    lines = file.getvalue().splitlines()
    # the first, the evaluation, every two seconds, the last
    assert [line.split()[2] for line in lines] == ["1/20", "3/20", "7/20", "11/20", "15/20", "19/20", "20/20"]
    assert lines[1] == (
        "grpo: step 3/20  accuracy 0.75  reward 0.375  loss 0.01  length 11.2  entropy 0.333  kl 0.003  grad 1.5  "
        "1.25 s (rollout 0.60, train 0.50, refit 0.10)  eta 0:08"
    )
    assert lines[-1].endswith("eta 0:00")


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from miles_spmd.telemetry.progress import open_progress\n"
        "from tests.telemetry.runs import make_config, step_metrics\n"
        "with open_progress(make_config(Path(sys.argv[1]))) as progress:\n"
        "    progress.phase('rollout'); time.sleep(0.4)\n"
        "    progress.update(1, step_metrics(1) | {'eval/sums': 0.75})\n"
        "    progress.phase('train'); progress.update(20, step_metrics(20))\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=theirs, env=environment)
    os.close(theirs)
    output = b""
    while True:
        try:
            output += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait(30) == 0
    text = output.decode()
    for word in ("grpo", "━", "rollout", "20/20", "accuracy 0.75  reward 0.8", "train 0.50", "eta"):
        assert word in text, word


def test_none_is_silent(tmp_path: Path) -> None:
    file = io.StringIO()
    with open_progress(make_config(tmp_path, telemetry={"progress": "none"}), file) as shown:
        shown.phase("train")
        shown.update(20, step_metrics(20))
    assert file.getvalue() == ""


def test_clock() -> None:
    assert [clock(s) for s in (0.2, 59.6, 65, 3725.2)] == ["0:00", "1:00", "1:05", "1:02:05"]


def test_scores_that_are_no_accuracies(tmp_path: Path) -> None:
    """Once a score was outside 0..1, no later one is taken for an accuracy."""
    file = io.StringIO()
    with open_progress(make_config(tmp_path), file) as shown:
        shown.update(0, {"eval/length": 3.08})
        shown.update(1, {"eval/length": 0.5})
        shown.update(2, {"eval/length": -2.0, "eval/length-pass@4": 0.5, "eval/\x1b[2Jsums": 0.25})
    assert [line.split("  ")[1:3] for line in file.getvalue().splitlines()] == [
        ["score 3.08", "eta -:--"],
        ["score 0.5", "eta 0:00"],
        ["score of length -2", r"score of \x1b[2Jsums 0.25"],
    ]


def test_an_evaluation_has_no_steps(tmp_path: Path) -> None:
    file = io.StringIO()
    with open_progress(make_config(tmp_path), file, training=False) as shown:
        shown.update(4, {"eval/sums": 0.75, "perf/step_time": 2.0})
    assert file.getvalue() == "grpo: evaluation after 4 steps  accuracy 0.75  2.00 s\n"
