"""What `status` and `tail` say about one run, which fails, is killed, and is continued to its end."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from miles_spmd.controller import attempts
from miles_spmd.controller.attempts import Attempts
from miles_spmd.controller.checkpoint_folders import newest
from miles_spmd.ledger.chain import verify
from miles_spmd.monitor.status import Status, _with_reason, read_status, render
from miles_spmd.monitor.tail import follow
from miles_spmd.types.run_files import complete_checkpoints
from tests.worker.launched import REPOSITORY, START_SECONDS, Launched
from tests.worker.tiny_run import REFERENCE_ENGINE, write_checkpoint, write_config

STEPS = 6


class Story:
    """The run, and its status after each chapter."""

    folder: Path
    failed: Status
    hung: Status
    killed: Status
    finished: Status
    followed: list[str]  # by somebody who came during the second attempt


def wait(run: Launched) -> int:
    return run.launcher.wait(START_SECONDS)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("story")
    config = write_config(
        folder,
        write_checkpoint(folder / "model"),
        run={"num_rollout": STEPS},
        rollout={"engine": REFERENCE_ENGINE},
        determinism={"parity": "off"},
        reward={"rm_type": "tests.monitor.rewards:obedient", "reward_workers": 1},
        checkpoint={"save_interval": 2, "resume": True, "export_final": False},
    )
    launched: list[Launched] = []

    def launch(deed: str) -> Launched:
        (folder / "deed").write_text(deed)
        launched.append(Launched(folder, config))
        return launched[-1]

    story = Story()
    story.folder = folder / "runs" / "tiny"
    try:
        assert wait(launch("raise 3")) == 1, launched[-1].report()
        story.failed = read_status(story.folder)
        second = launch("hang 5")
        wait_for(lambda: (folder / "held").exists(), second)
        wait_for(lambda: (now := read_status(story.folder)).phase == "rollout" and now.step == 5, second)
        wait_for(lambda: 4 in complete_checkpoints(story.folder), second)  # which is written beside the steps
        story.hung = read_status(story.folder)
        story.followed, ended = [], threading.Event()

        def watch() -> None:
            for lines in follow(story.folder, 3, follows=True, keeps=True, warn=story.followed.append):
                story.followed.extend(lines)
                if ended.is_set():
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        for pid in second.processes():
            os.kill(pid, signal.SIGKILL)
        second.launcher.wait(20)
        wait_for(lambda: not second.processes(), second)
        story.killed = read_status(story.folder)
        assert wait(launch("nothing 0")) == 0, launched[-1].report()
        story.finished = read_status(story.folder)
        time.sleep(1.0)  # two looks of the watcher
        ended.set()
        watcher.join()
    finally:
        for run in launched:
            run.clean_up()
    return story


def wait_for(condition: object, run: Launched) -> None:
    end = time.monotonic() + START_SECONDS
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, run.report()
        time.sleep(0.05)


def rows(story: Story) -> list[dict[str, float]]:
    return [json.loads(line) for line in (story.folder / "metrics.jsonl").read_text().splitlines()]


def verb(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "miles_spmd", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_every_attempt_has_its_end_and_its_reason(story: Story) -> None:
    lines = [json.loads(line) for line in (story.folder / "attempts.jsonl").read_text().splitlines()]
    assert [line["state"] for line in lines] == ["failed", "killed", "finished"]
    assert "ValueError: this reward fails here" in lines[0]["reason"]
    assert [line["reason"] for line in lines[1:]] == ["killed", "finished"]
    assert [(line["first_step"], line["last_step"]) for line in lines] == [(0, 3), (2, 5), (4, 6)]
    assert all(line["start"] < line["ready"] < line["end"] for line in lines)
    assert all(a["end"] < b["start"] for a, b in itertools.pairwise(lines))
    assert [msgspec.to_builtins(one) for one in story.finished.attempts] == lines
    assert len(verify(story.folder).steps) == STEPS  # the ledger has each step once, whatever was lost on the way


def test_lost_is_what_no_checkpoint_has(story: Story) -> None:
    """From the line of the step that was saved last, by the times in the metrics."""
    times: dict[int, list[float]] = {}
    for row in rows(story):
        times.setdefault(int(row["step"]), []).append(row["time"])
    failed, killed, finished = story.finished.attempts
    assert failed.end is not None
    assert failed.seconds_lost == pytest.approx(failed.end - times[2][0], abs=0.01)
    assert failed.seconds_lost > rows(story)[3]["perf/step_time"]  # step 3 was done, and is done again
    assert killed.end is not None
    assert killed.seconds_lost == pytest.approx(killed.end - times[4][0], abs=0.01)
    assert finished.seconds_lost == 0
    assert story.finished.seconds_lost == pytest.approx(failed.seconds_lost + killed.seconds_lost)


def test_a_run_of_cells_continues_with_the_ranks_of_one(story: Story, tmp_path: Path) -> None:
    folder = shutil.copytree(story.folder, tmp_path / "run", symlinks=True)
    for name, old, new in (
        ("config.toml", "\ncells = 1\n", "\ncells = 2\n"),
        ("attempts.jsonl", '"state":"finished"', '"state":"failed"'),
    ):
        text = (folder / name).read_text()
        assert text.count(old) == 1
        (folder / name).write_text(text.replace(old, new))
    found = read_status(folder)
    assert found.attempts[-1].ranks == 2
    assert found.resume.endswith(" checkpoint.resume=true --nproc-per-node 1")


def test_a_run_that_has_no_cells_any_more_counts_none(story: Story, tmp_path: Path) -> None:
    folder = shutil.copytree(story.folder, tmp_path / "run", symlinks=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "perf/cells": 2.0}\n{"step": 2}\n')
    assert "perf/cells" not in read_status(folder).metrics
    settings = folder / "config.toml"
    settings.write_text(settings.read_text().replace("\ncells = 1\n", "\ncells = 4\n"))
    assert "  cells 2 of 4\n" in render(read_status(folder))


def test_status_of_each_state(story: Story) -> None:
    assert (story.failed.state, story.failed.step, story.failed.steps) == ("failed", 3, STEPS)
    assert "checkpoint.resume=true" in story.failed.resume
    assert "--nproc-per-node 2" in story.failed.resume
    assert story.failed.checkpoint
    assert story.failed.checkpoint.step == 2
    assert (story.hung.state, story.hung.step, story.hung.phase) == ("running", 5, "rollout")
    assert story.hung.eta is not None
    assert story.hung.seconds_per_step is not None
    assert 0 <= story.hung.eta <= story.hung.seconds_per_step
    assert story.hung.resume == ""
    assert "rollout/raw_reward" in story.hung.metrics
    assert (story.killed.state, story.killed.reason) == ("killed", "killed")
    assert story.killed.attempts[-1].last_step == 5
    assert (story.finished.state, story.finished.step, story.finished.resume) == ("finished", STEPS, "")
    for status in (story.failed, story.hung, story.killed, story.finished):
        assert status.state in render(status).splitlines()[0]
        assert not status.problems


def test_a_step_takes_what_the_metrics_say(story: Story) -> None:
    own = [row["perf/step_time"] for row in rows(story)[-2:]]  # without the line that has the start
    assert story.finished.seconds_per_step == pytest.approx(sum(own) / 2)


def test_status_and_the_checkpoints_agree(story: Story) -> None:
    assert list(complete_checkpoints(story.folder).values())[-1] == newest(story.folder)


def test_the_verb_is_quick(story: Story) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = verb("status", story.folder).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 0.8  # seconds of computing: an import of torch takes several
    for word in ("tiny (train), finished", "6 of 6", "killed", "this reward fails here", "checkpoint:"):
        assert word in text
    assert msgspec.json.decode(verb("status", story.folder, "--json").stdout, type=Status).attempts == (
        story.finished.attempts
    )


def test_logs_have_a_folder_for_each_attempt(story: Story) -> None:
    logs = story.folder / "logs"
    assert {path.name for path in logs.iterdir()} == {"attempt_0001", "attempt_0002", "attempt_0003", "latest"}
    assert os.readlink(logs / "latest") == "attempt_0003"
    for folder in logs.glob("attempt_*"):
        for rank in (0, 1):
            assert (folder / f"rank-{rank}.log").read_text().count("--- ") == 1  # of this attempt alone
    assert "this reward fails here" in (logs / "attempt_0001" / "controller.log").read_text()


def test_the_start_says_where_its_seconds_went(story: Story) -> None:
    first = rows(story)[0]
    parts = {name: value for name, value in first.items() if name.startswith("start/")}
    assert {"start/total", "start/join", "start/imports", "start/trainer"} <= parts.keys()
    assert all(value >= 0 for value in parts.values())
    line = next(
        line for line in verb("tail", story.folder, "--no-follow", "-n", "1000").stdout.splitlines() if "join" in line
    )
    assert f"tiny: start {parts['start/total']:.1f} s (slowest rank " in line


def test_tail_shows_what_the_terminal_showed(story: Story) -> None:
    lines = verb("tail", story.folder, "-n", "1000").stdout.splitlines()  # the run has ended, and so does this
    heads = [line for line in lines if line.startswith("==> attempt")]
    assert [head.split()[2] for head in heads] == ["1:", "2:", "3:"]
    steps = [line.split(": step ")[1].split("/")[0] for line in lines if ": step " in line]
    assert steps == ["0", "1", "2", "3", "2", "3", "4", "5", "4", "5", "6"]
    assert sum("checkpoint after 4 steps" in line for line in lines) == 1
    assert any("ended: " in line and "this reward fails here" in line for line in lines)
    assert verb("tail", story.folder, "--no-follow", "-n", "2").stdout.splitlines() == lines[-2:]


def test_tail_follows_the_run_through_a_new_attempt(story: Story) -> None:
    assert len(story.followed) > 4
    assert any(line.startswith("==> attempt 3") for line in story.followed)
    assert "step 6/6" in "\n".join(story.followed)
    assert "step 0/6" not in "\n".join(story.followed)  # of the past three lines were asked for


# --- on another machine, and with damaged files -----------------------------------------------------------------------


@pytest.fixture
def copy(story: Story, tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "copy"
    shutil.copytree(story.folder, folder, symlinks=True)
    return folder


def unended(folder: Path, **changes: object) -> Path:
    """As if the last attempt had no end; the file that is its sign of life."""
    path = folder / "logs" / "attempt_0003" / "state.json"
    sign = json.loads(path.read_bytes())
    sign |= changes
    sign["record"] |= {"end": None, "state": "running", "reason": ""}
    path.write_text(json.dumps(sign))
    lines = (folder / "attempts.jsonl").read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {"end": None, "state": "running", "reason": ""})
    (folder / "attempts.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_on_another_machine_a_fresh_sign_of_life_counts(copy: Path) -> None:
    path = unended(copy, host="node-7")
    for age, running in (
        (0, True),
        (attempts.SILENT_AFTER - 5, True),
        (-100, True),
        (attempts.SILENT_AFTER + 5, False),
    ):
        then = time.time() - age
        os.utime(path, (then, then))
        assert (Attempts(copy).sign is not None) is running
        assert read_status(copy).state == ("running" if running else "killed")


def test_on_this_machine_the_process_counts(copy: Path) -> None:
    unended(copy, pid=os.getpid())  # somebody else has the number now
    assert read_status(copy).state == "killed"


def test_an_older_run_has_no_attempts(copy: Path) -> None:
    (copy / "attempts.jsonl").unlink()
    shutil.rmtree(copy / "logs")
    status = read_status(copy)
    assert (status.state, status.step, status.steps) == ("unknown", STEPS, STEPS)
    assert "no record of an attempt" in verb("tail", copy, status=2).stderr


@pytest.mark.parametrize("name", ["attempts.jsonl", "metrics.jsonl", "logs/attempt_0003/state.json", "config.toml"])
def test_damaged_files_are_named_once(copy: Path, name: str) -> None:
    unended(copy)
    path = copy / name
    content = path.read_bytes()
    path.write_bytes(content[:40] + b"\xff\x00" + content[60:])
    done = verb("status", copy)
    (line,) = done.stderr.splitlines()
    assert line.startswith("miles-spmd: warning: ")
    assert str(path) in line
    assert done.stdout.startswith("run: ")


def test_tail_prints_no_escapes_of_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "attempts.jsonl").write_text('{"attempt":1,"task":"tr\\u001b[2Jain","start":1,"end":2}\n')
    assert "tr\\x1b[2Jain, 0 ranks" in verb("tail", tmp_path, "--no-follow").stdout


@pytest.mark.parametrize("name", ["status", "tail"])
def test_what_is_no_run(tmp_path: Path, story: Story, name: str) -> None:
    (tmp_path / "file").touch()
    cases = {
        tmp_path / "none": "none does not exist; name the folder of a run",
        tmp_path / "file": "file is a file; name the folder of a run",
        tmp_path: "is not the folder of a run (it has no attempts.jsonl)",
        story.folder.parent: "name one of the runs in it: tiny",
    }
    for folder, message in cases.items():
        (line,) = verb(name, folder, status=2).stderr.splitlines()
        assert line.startswith("miles-spmd: error: ")
        assert message in line


@pytest.mark.parametrize(
    ("state", "reason", "text"),
    [
        ("stopped", "stopped by SIGTERM", "stopped by SIGTERM"),
        ("failed", "no space left", "failed: no space left"),
        ("finished", "finished", "finished"),
        ("killed", "", "killed"),
    ],
)
def test_a_reason_that_says_the_state_is_all_that_is_shown(state: str, reason: str, text: str) -> None:
    assert _with_reason(state, reason) == text
