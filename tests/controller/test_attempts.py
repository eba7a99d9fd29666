"""The record of a run's attempts, without a run: numbers, ends, and what is kept or deleted."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from miles_spmd.controller import attempts
from miles_spmd.controller.attempts import Attempts
from miles_spmd.controller.run_folder import claim
from tests.controller.test_run_folder import leave_results, make


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]


def test_an_attempt_from_its_begin_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    attempt = attempts.begin(tmp_path, "train", 4)
    (line,) = lines(tmp_path)
    assert (line["attempt"], line["job"], line["restart"], line["ranks"], line["end"]) == (1, "42", 2, 4, None)
    attempt.ready(7, ["b", "a", "b"])
    attempt.phase("rollout")
    attempt.step(9)
    end = time.monotonic() + 30
    while json.loads((attempt.folder / "state.json").read_bytes())["phase"] != "rollout":  # within a second or so
        assert time.monotonic() < end
        time.sleep(0.05)
    attempt.tell("first\nsecond \x1b[2J")
    attempt.end("stopped", "rollout, step 9: stopped by SIGTERM\nand more")
    attempt.close()
    (line,) = lines(tmp_path)
    assert (line["first_step"], line["last_step"], line["nodes"]) == (7, 9, ["a", "b"])
    assert (line["state"], line["reason"]) == ("stopped", "rollout, step 9: stopped by SIGTERM")
    assert line["seconds_lost"] == pytest.approx(float(line["end"]) - float(line["ready"]), abs=0.01)  # type: ignore[arg-type]
    assert (attempt.folder / "progress.log").read_text().endswith(" first\nsecond \\x1b[2J\n")


def test_a_killed_attempt_gets_its_end_from_the_next(tmp_path: Path) -> None:
    first = attempts.begin(tmp_path, "train", 1)
    first.ready(0, ["a"])
    first.step(3)
    first._stop.set()
    first._thread.join()
    first._write_sign()  # the last sign of life
    for _ in range(2):
        second = attempts.begin(tmp_path, "train", 1)
        killed, *others = lines(tmp_path)
        sign = json.loads((first.folder / "state.json").read_bytes())
        assert (killed["state"], killed["reason"], killed["end"]) == ("killed", "killed", sign["time"])
        assert killed["last_step"] == 3
        assert killed["seconds_lost"] == pytest.approx(sign["time"] - killed["ready"], abs=0.01)
        second.end("finished", "finished")
    assert [other["state"] for other in others] == [
        "finished",
        "running",
    ]  # of that one the file state.json has the end
    assert [one.state for one in Attempts(tmp_path).records] == ["killed", "finished", "finished"]


def test_a_line_that_cannot_be_read_stays(tmp_path: Path) -> None:
    (tmp_path / "attempts.jsonl").write_bytes(b'{"attempt": 1, "ta\n')
    (tmp_path / "logs" / "attempt_0001").mkdir(parents=True)
    attempt = attempts.begin(tmp_path, "train", 1)
    attempt.end("finished", "finished")
    attempt.close()
    cut, whole = (tmp_path / "attempts.jsonl").read_bytes().splitlines()
    assert cut == b'{"attempt": 1, "ta'
    assert json.loads(whole)["attempt"] == 2
    assert "1 of 2 lines cannot be read: line 1" in Attempts(tmp_path).problems[0]


def test_logs_of_a_start_that_failed_are_collected(tmp_path: Path) -> None:
    attempt = attempts.begin(tmp_path, "train", 2)
    (tmp_path / "logs" / "rank-1.starting.log").write_text("why\n")
    attempt.end("failed", "start: ...")
    assert (attempt.folder / "rank-1.log").read_text() == "why\n"
    assert not list((tmp_path / "logs").glob("rank-*"))


def test_logs_of_ranks_that_did_not_start_again_are_collected(tmp_path: Path) -> None:
    attempt = attempts.begin(tmp_path, "train", 2)
    attempt.ready(0, ["a"])
    (attempt.folder / "rank-1.log").write_text("before\n")
    for name in ("starting.log", "standby.log", "standby.stacks"):
        (tmp_path / "logs" / f"rank-1.{name}").write_text("why\n")
    attempt.end("failed", "rank 0 died")
    assert (attempt.folder / "rank-1.log").read_text() == "before\n"
    assert (attempt.folder / "rank-1.starting.log").read_text() == "why\n"
    assert not list((tmp_path / "logs").glob("rank-*"))


def test_overwriting_deletes_attempts_and_a_failed_start_does_not(tmp_path: Path) -> None:
    config = make(tmp_path)
    leave_results(config, steps=-1, saved=None)
    flat = config.run_dir / "logs" / "rank-0.log"  # of a run from before there were attempts
    for number in (1, 2):
        claim(config, "train").close()  # type: ignore[union-attr]
        attempt = attempts.begin(config.run_dir, "train", 1)
        attempt.end("failed", "start: ...")
        attempt.close()
        flat.write_text("older\n")
        assert len(lines(config.run_dir)) == number
    claim(make(tmp_path, "run.overwrite=true"), "train").close()  # type: ignore[union-attr]
    assert not (config.run_dir / "attempts.jsonl").exists()
    assert [path.name for path in (config.run_dir / "logs").iterdir()] == ["rank-0.log"]
    attempts.begin(config.run_dir, "train", 1).end("finished", "finished")
    assert [line["attempt"] for line in lines(config.run_dir)] == [1]
