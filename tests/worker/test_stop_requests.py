"""A run whose processes are asked to stop: by signals to each of them and to all, by the file, at every time. It ends
with one message and status 75, leaves no process, and goes on as if it had never stopped. Real processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from miles_spmd.controller.checkpoint_folders import newest, read
from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.compare import compare
from miles_spmd.protocol import last_words
from miles_spmd.protocol.pipe import REQUEUE
from miles_spmd.types.cell import Cell
from miles_spmd.types.phase import Phase
from tests import forked
from tests.slurm.cluster import wait_for
from tests.worker.launched import REPOSITORY, START_SECONDS, Launch, Launched
from tests.worker.tiny_run import REFERENCE_ENGINE, write_checkpoint, write_config


@pytest.fixture
def launch(launch: Launch) -> Launch:
    """Runs that can be continued, and whose ledgers can be compared."""

    def start(*deed: object, **changes: dict[str, Any]) -> Launched:
        changes["determinism"] = {"deterministic": True}
        changes["checkpoint"] = {"export_final": False, "resume": True} | changes.get("checkpoint", {})
        return launch(*deed, **changes)

    return start


ENDLESS = {"num_rollout": 100000}


def stopped(run: Launched, status: int = REQUEUE) -> str:
    message = run.finish(60)
    assert run.launcher.returncode == status, run.report()
    return message


def go_on(run: Launched, *overrides: str) -> str:
    """Continue to the end; what the run prints."""
    done = forked.run(
        "-m", "miles_spmd", "train", run.folder / "config.toml", "--nproc-per-node=2", *overrides, folder=run.folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_file_stops_it_and_the_ledger_is_that_of_a_run_that_never_stopped(launch: Launch, tmp_path: Path) -> None:
    run = launch(run=ENDLESS, reward={"rm_type": "tests.recipe_run:coin"})
    run.wait_for_steps(2)
    (run.run_dir / "stop").touch()
    message = stopped(run)
    found = re.fullmatch(r"stopped by .*/stop before step (\d+): all is saved", message)
    assert found
    said = (tmp_path / "stdout").read_text()
    assert re.search(r"tiny: stopping: .*/stop, no time limit: finishing step \d+", said)
    assert f"checkpoint: {newest(run.run_dir)}\n" in said
    assert "continue:   miles-spmd train " in said
    assert not (run.run_dir / "stop").exists()
    steps = int(found[1]) + 3
    for name in ("tiny", "undisturbed"):
        go_on(run, f"run.name={name}", f"run.num_rollout={steps}")
    same = compare(verify(run.run_dir), verify(run.run_dir.with_name("undisturbed")))
    assert same.equal, same.difference
    assert same.steps == list(range(steps))


@pytest.mark.parametrize(
    ("number", "place"),
    [
        (signal.SIGUSR1, "launcher"),
        (signal.SIGTERM, "launcher"),
        (signal.SIGUSR1, "rank 1"),
        (signal.SIGTERM, "all"),
        pytest.param(signal.SIGTERM, "rank 0", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, "all", marks=pytest.mark.slow),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else value.replace(" ", "-"),
)
def test_a_signal_stops_it(launch: Launch, number: signal.Signals, place: str) -> None:
    run = launch(run=ENDLESS, checkpoint={"save_interval": 2})  # so that a checkpoint has been measured
    run.wait_for_steps(3)
    match place:
        case "launcher":
            os.kill(run.launcher.pid, number)
        case "all":
            for pid in run.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        case _:
            os.kill(run.wait_for_ranks()[int(place[-1])], number)
    message = stopped(run)
    found = re.fullmatch(rf"stopped by {number.name} before step (\d+): all is saved", message)
    assert found, message
    folder = newest(run.run_dir)
    assert folder is not None
    assert read(folder).step == int(found[1])
    seconds = {"SIGTERM": 30, "SIGUSR1": 300}[number.name]
    assert f"tiny: stopping: {number.name}, {seconds} s left: finishing step " in (run.folder / "stdout").read_text()


def test_a_stop_does_not_wait_for_a_reward_that_hangs(launch: Launch) -> None:
    """The responses are in the checkpoint, and the next run scores them."""
    run = launch(run={"num_rollout": 1}, reward={"rm_type": "tests.worker.rewards:hangs", "reward_workers": 1})
    run.wait_until_held()
    os.kill(run.launcher.pid, signal.SIGUSR1)
    found = re.fullmatch(
        r"stopped by SIGUSR1 in step 0: (\d+ complete and \d+ partial responses.*) are saved", stopped(run)
    )
    assert found
    assert "leaving step 0, whose end cannot be estimated" in (run.folder / "stdout").read_text()
    assert f"step 0 continues {found[1]}" in go_on(run, "reward.rm_type=tests.worker.rewards:by_length")


STARTS = """
import os, signal, sys
from miles_spmd import launcher
signal.signal(signal.SIGHUP, getattr(signal, sys.argv[2]))
launcher.load = lambda *_, **__: os.kill(os.getpid(), int(sys.argv[1])) or sys.exit(3)
launcher.start("train", None, [], 1)
"""


@pytest.mark.parametrize(
    ("number", "hangup", "status"),
    [
        (signal.SIGTERM, "SIG_DFL", 75),
        (signal.SIGUSR1, "SIG_DFL", 75),
        (signal.SIGINT, "SIG_DFL", 130),
        (signal.SIGHUP, "SIG_DFL", 129),
        (signal.SIGHUP, "SIG_IGN", 3),  # it goes on
    ],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_before_the_start_of_ranks_it_ends_at_once(number: signal.Signals, hangup: str, status: int) -> None:
    command = [sys.executable, "-c", STARTS, str(int(number)), hangup]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == status, done.stderr
    assert done.stderr == ("" if status == 3 else f"miles-spmd: start: stopped by {number.name}\n")


def test_the_launcher_of_a_cell_does_not_speak_for_the_run(tmp_path: Path) -> None:
    """Where it is stopped with the others while its cell is started again: what is saved, the controller says."""
    (unsaid := tmp_path / "unsaid").touch()
    cell = Cell(1, 2, "http://127.0.0.1:1", str(tmp_path / "keys-1-1.json"))
    done = subprocess.run(
        [sys.executable, "-c", STARTS, str(int(signal.SIGTERM)), "SIG_DFL"],
        env=os.environ | cell.environment | {last_words.VARIABLE: str(unsaid)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (REQUEUE, "")
    assert unsaid.exists()


@pytest.mark.slow
def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, write_checkpoint(tmp_path / "model"), run=ENDLESS, rollout={"engine": REFERENCE_ENGINE}
    )
    command = ["nohup", sys.executable, "-m", "miles_spmd", "train", config]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with (tmp_path / "output").open("wb") as output:
        launcher = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output)
    try:
        wait_for((metrics := tmp_path / "runs" / "tiny" / "metrics.jsonl").exists, START_SECONDS)
        launcher.send_signal(signal.SIGHUP)
        steps = len(metrics.read_text().splitlines())
        wait_for(lambda: len(metrics.read_text().splitlines()) > steps + 3, START_SECONDS)
        launcher.send_signal(signal.SIGUSR1)
        assert launcher.wait(START_SECONDS) == 75, (tmp_path / "output").read_text()
    finally:
        launcher.kill()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_at_the_start_there_is_nothing_to_save(launch: Launch, number: signal.Signals) -> None:
    run = launch()
    run.wait_for_ranks()
    os.kill(run.launcher.pid, number)
    message = stopped(run)
    assert message.startswith(f"start: stopped by {number.name}"), message


def test_asked_twice_it_ends_whatever_hangs(launch: Launch) -> None:
    """Under a torchrun of one's own, which turns the status into 1."""
    run = launch(Phase.TRAIN, 1, "hang")
    run.wait_until_held()
    ranks = run.wait_for_ranks()
    os.kill(ranks[1], signal.SIGUSR1)
    time.sleep(2.5)
    began = time.monotonic()
    os.kill(ranks[0], signal.SIGTERM)
    assert stopped(run, 1) == "train, step 0: stopped by SIGUSR1, and the time is over"
    assert time.monotonic() - began < 20
    assert "again: saving what can be saved within 10 s" in (run.folder / "stdout").read_text()


def test_a_rank_that_dies_meanwhile_is_named(launch: Launch) -> None:
    run = launch(Phase.TRAIN, 1, "hang")
    pid = run.wait_until_held()
    os.kill(run.wait_for_ranks()[0], signal.SIGUSR1)
    time.sleep(1)
    os.kill(pid, signal.SIGKILL)
    message = stopped(run, 1)
    assert message.startswith("rank 1 (")
    assert "died: train, step 0" in message


def test_a_file_asks_for_a_checkpoint(launch: Launch) -> None:
    run = launch(run=ENDLESS)
    run.wait_for_steps(1)
    (run.run_dir / "save").touch()
    run._wait_for(lambda: newest(run.run_dir) is not None, START_SECONDS)
    assert not (run.run_dir / "save").exists()
    assert run.launcher.poll() is None


@pytest.mark.slow
def test_processes_that_begin_end_with_the_same_status(launch: Launch, tmp_path: Path, checkpoint: Path) -> None:
    """A whole launcher, signalled while its rank imports."""
    config = write_config(tmp_path, checkpoint)
    command = [sys.executable, "-m", "miles_spmd", "train", str(config), "--nproc-per-node", "1"]
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    launcher = subprocess.Popen(command, cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + START_SECONDS
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    while not children.read_text() and time.monotonic() < end:
        time.sleep(0.02)
    launcher.send_signal(signal.SIGUSR1)
    stderr = launcher.communicate(timeout=START_SECONDS)[1]
    assert launcher.returncode == REQUEUE
    assert "start: stopped by SIGUSR1" in stderr
