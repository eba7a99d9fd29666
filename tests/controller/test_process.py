"""The controller as a child process: its order, its last message, and that neither side outlives the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from miles_spmd.config.load import load_config
from miles_spmd.processes import session
from miles_spmd.processes.session import members
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.messages import Heartbeat
from miles_spmd.protocol.pipe import REQUEUE
from miles_spmd.protocol.router import LOOPBACK
from miles_spmd.types.phase import Phase
from miles_spmd.worker.controller_process import ControllerProcess
from tests.worker.tiny_run import write_checkpoint, write_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def start(tmp_path: Path, checkpoint: Path) -> Iterator[Callable[..., ControllerProcess]]:
    started: list[ControllerProcess] = []

    def make(**changes: dict[str, object]) -> ControllerProcess:
        config = load_config(write_config(tmp_path, checkpoint, **changes), check_files=False)
        started.append(ControllerProcess(config, "train", LOOPBACK, 2))
        return started[-1]

    yield make
    for process in started:
        process.wait(0)


Start = Callable[..., ControllerProcess]


def test_an_error_before_any_worker_is_there(start: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    controller = start(model={"hf_checkpoint": str(tmp_path), "dtype": "float32"})
    assert controller.wait(60) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"miles-spmd: start: TokenizerError: {tmp_path}/tokenizer.json does not exist")
    assert error.count("\n") == 1
    assert "Traceback" in (tmp_path / "runs" / "tiny" / "logs" / "latest" / "controller.log").read_text()


def test_a_random_model_is_there_also_where_no_rank_has_written_it(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With cells, the controller is on a node without ranks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    controller = start(model={"hf_checkpoint": "random:qwen3-0.6b/1"})
    controller.credentials()
    tokenizer, until = tmp_path / "cache/miles-spmd/random/qwen3-0.6b-1/tokenizer.json", time.monotonic() + 60
    while not tokenizer.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert tokenizer.stat().st_size > 1000


def test_told_to_stop_it_says_why_and_who_is_missing(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    controller = start()
    dealer = Dealer(controller.credentials()[1])
    dealer.send(Heartbeat(rank=1, phase=Phase.START, step=0))
    time.sleep(0.5)  # for the heartbeat
    controller.stop("stopped by SIGTERM")
    assert controller.wait(60) == REQUEUE
    assert capfd.readouterr().err == "miles-spmd: start: stopped by SIGTERM; rank 0 had not connected\n"
    dealer.close()


def test_a_request_that_only_it_gets_waits_until_it_listens(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    controller = start(deadlines={"start_timeout": 30.0})
    os.kill(controller.pid, signal.SIGUSR1)  # its interpreter has hardly begun
    assert controller.wait(60) == REQUEUE
    assert capfd.readouterr().err == "miles-spmd: start: stopped by SIGUSR1; rank 0, 1 had not connected\n"


def test_a_deadline_ends_it(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    assert start(deadlines={"start_timeout": 1.0}).wait(60) == 1
    assert capfd.readouterr().err.startswith("miles-spmd: start: rank 0, 1 did not reply within 1 s\n")


def test_a_controller_that_does_not_end_is_killed(start: Start) -> None:
    controller = start()
    controller.credentials()
    os.kill(controller.pid, signal.SIGSTOP)
    began = time.monotonic()
    assert controller.wait(0.2) == -signal.SIGKILL
    assert time.monotonic() - began < 5


LAUNCHER = """
import sys, time
from miles_spmd.config.load import load_config
from miles_spmd.worker.controller_process import ControllerProcess
controller = ControllerProcess(load_config(sys.argv[1]), "train", "127.0.0.1", 2)
controller.credentials()
print(controller.pid, flush=True)
time.sleep(600)
"""


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


STARTS_A_GROUP = (
    "import subprocess; print(subprocess.Popen(['sleep', '600'], process_group=0).pid, flush=True); input()"
)


def test_a_session_ends_with_all_process_groups() -> None:
    command = [sys.executable, "-c", STARTS_A_GROUP]
    leader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert leader.stdout is not None
    other = int(leader.stdout.readline())
    assert sorted(members(leader.pid)) == sorted([leader.pid, other])
    leader.kill()
    leader.wait()
    assert members(leader.pid) == [other]
    session.kill(leader.pid)
    assert members(leader.pid) == []


@pytest.mark.parametrize("who", ["rank 0", "controller"])
def test_neither_outlives_the_other(tmp_path: Path, checkpoint: Path, who: str) -> None:
    """Nor do the processes of the reward pool."""
    config = write_config(tmp_path, checkpoint, reward={"rm_type": "math", "reward_workers": 2})
    with (tmp_path / "stderr").open("wb") as stderr:
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(config)], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    assert launcher.stdout is not None
    controller = int(launcher.stdout.readline())
    wait_for(lambda: len(members(controller)) >= 3)
    os.kill(launcher.pid if who == "rank 0" else controller, signal.SIGKILL)
    wait_for(lambda: not members(controller), 15)
    launcher.kill()
    launcher.wait()
    messages = [line for line in (tmp_path / "stderr").read_text().splitlines() if line.startswith("miles-spmd")]
    assert messages == (["miles-spmd: start: rank 0 died; rank 0, 1 had not connected"] if who == "rank 0" else [])
