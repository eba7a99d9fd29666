"""The side thread of a worker: what it says, and when it ends its process. A real process behind a real router."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from miles_spmd.protocol.messages import Heartbeat, Held, HoldPasses, ReleasePasses, StopNotice
from miles_spmd.protocol.pipe import LAUNCHER, SUPERVISOR
from miles_spmd.protocol.router import Router
from miles_spmd.types.phase import Phase

WORKER = """
import sys, time
from pathlib import Path
import msgspec
from miles_spmd.protocol.pipe import Credentials
from miles_spmd.types.phase import Phase
from miles_spmd.worker.watchdog import Watchdog

def train_step():
    time.sleep(600)

watchdog = Watchdog(1, sys.stderr, Path(sys.argv[2]), None)
watchdog.start()
watchdog.connect(msgspec.json.decode(sys.argv[1], type=Credentials), 10.0)
watchdog.enter(Phase.TRAIN, 3, float(sys.argv[3]))
watchdog.progress("micro-batch 2/8")
train_step()
"""


class Watched:
    def __init__(self, stacks: Path, deadline: float) -> None:
        self.router = Router(ranks=2)
        self.stacks = stacks
        credentials = msgspec.json.encode(self.router.credentials[1]).decode()
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, credentials, str(stacks), str(deadline)], stderr=subprocess.PIPE, text=True
        )

    def heartbeat(self, wanted: Callable[[Heartbeat], bool], seconds: float = 30) -> Heartbeat:
        """The first such one."""
        found = self.message(lambda message: isinstance(message, Heartbeat) and wanted(message), seconds)
        assert isinstance(found, Heartbeat)
        return found

    def message(self, wanted: Callable[[object], bool], seconds: float = 30) -> object:
        """The first such one."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            event = self.router.receive(end - time.monotonic())
            if event is not None and wanted(event[1]):
                return event[1]
        raise AssertionError("no such message")

    def end(self) -> tuple[int, str]:
        """Exit status and what it printed."""
        output = self.process.communicate(timeout=30)[1]
        return self.process.returncode, output


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def make(deadline: float = 600) -> Watched:
        made.append(Watched(tmp_path / "rank-1.stacks", deadline))
        return made[-1]

    yield make
    for one in made:
        one.process.kill()
        one.process.communicate()
        one.router.close()


def in_train_step(heartbeat: Heartbeat) -> bool:
    return "train_step" in heartbeat.detail


def test_heartbeats_tell_where_the_main_thread_is(watched: Callable[..., Watched]) -> None:
    w = watched()
    heartbeat = w.heartbeat(in_train_step)
    assert (heartbeat.rank, heartbeat.phase, heartbeat.step) == (1, Phase.TRAIN, 3)
    assert heartbeat.detail == "micro-batch 2/8, train_step (<string>:10)"
    began = time.monotonic()
    w.heartbeat(in_train_step)
    assert 0.5 < time.monotonic() - began < 5
    assert not w.stacks.exists()


def test_a_missed_deadline_leaves_all_stacks_once(watched: Callable[..., Watched]) -> None:
    w = watched(deadline=2.5)
    w.heartbeat(in_train_step)
    end = time.monotonic() + 20
    while not w.stacks.exists():
        w.heartbeat(in_train_step)
        assert time.monotonic() < end
    for _ in range(2):
        w.heartbeat(in_train_step)
    stacks = w.stacks.read_text()
    assert stacks.count("train, step 3: deadline missed") == 1
    assert "in train_step" in stacks
    assert "watchdog.py" in stacks  # the other thread
    assert w.process.poll() is None  # the controller decides what comes of it


def test_an_interruption_is_announced(watched: Callable[..., Watched]) -> None:
    w = watched()
    w.heartbeat(in_train_step)
    w.process.send_signal(signal.SIGINT)
    assert w.heartbeat(lambda heartbeat: heartbeat.phase is Phase.STOP).detail == "stopped by SIGINT"
    assert w.end() == (1, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_request_to_stop_is_passed_on(watched: Callable[..., Watched], number: signal.Signals) -> None:
    """The process goes on; when the controller has ended, it does not wait for its launcher."""
    w = watched()
    w.heartbeat(in_train_step)
    w.process.send_signal(number)
    assert w.message(lambda message: isinstance(message, StopNotice)) == StopNotice(1, number.name)
    w.heartbeat(in_train_step)
    assert w.process.poll() is None


def test_it_holds_forward_passes(watched: Callable[..., Watched]) -> None:
    w = watched()
    w.heartbeat(in_train_step)
    (side,) = w.router.rank_of
    w.router.send(HoldPasses(), [side])
    assert w.message(lambda message: isinstance(message, Held)) == Held(1, 0, None)
    w.router.send(ReleasePasses(3), [side])
    w.heartbeat(in_train_step)


def test_without_a_controller_it_ends(watched: Callable[..., Watched]) -> None:
    w = watched()
    w.heartbeat(in_train_step)
    w.router.close()
    assert w.end() == (1, f"miles-spmd: rank 1 ({socket.gethostname()}), train, step 3: lost the controller\n")
    w.router = Router()  # for the fixture to close


@pytest.mark.parametrize("variable", [LAUNCHER, SUPERVISOR])
def test_who_died_before_the_rank_looked_is_missed(
    watched: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """The rank of a launcher has another parent from the start."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setenv(variable, str(gone.pid))
    status, _ = watched().end()
    assert status == 1
