"""A start of the run, as it is seen from outside: what it prints, its processes, and what is left of it at its end."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from miles_spmd.controller.attempts import Attempts
from miles_spmd.faults.strikes import VARIABLE, Strike
from miles_spmd.telemetry.json_lines import Lines
from miles_spmd.types.files import naming
from miles_spmd.types.printable import printable
from miles_spmd.types.run_files import METRICS_FILE
from miles_spmd.worker.meeting import made_by_launcher

LOOK_EVERY = 0.05  # seconds
KILLED = 5.0  # seconds that killed processes may take to end


class Program(Protocol):
    """What is used of ``subprocess.Popen``."""

    pid: int

    def poll(self) -> int | None: ...


Start = Callable[[Sequence[str], Mapping[str, str], Path], Program]  # arguments, environment, where it prints


def start_program(arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> Program:
    """Start ``python ARGUMENTS``, in a session of its own, so that what interrupts this process does not reach it."""
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@dataclass(frozen=True)
class Line:
    """What a launch has printed, and when (Unix seconds)."""

    time: float
    text: str


@dataclass
class Launch:
    """One start of the run. Times are Unix seconds."""

    number: int
    began: float
    lines: list[Line] = field(default_factory=list)
    strikes: list[Strike] = field(default_factory=list)
    ended: float = 0.0  # when no process was left
    status: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the metrics, at its end
    ready: float | None = None  # when all ranks were built and the checkpoint was loaded
    first_step: int = 0  # done when it was ready
    stopped: bool = False  # on request

    def end(self, status: int, folder: Path) -> None:
        """Read what the launch has left in the ``folder`` of the run. Raises OSError."""
        self.ended, self.status = time.time(), status
        self.rows = Lines(folder / METRICS_FILE, dict[str, Any]).values
        records = Attempts(folder).records
        if records and records[-1].start >= self.began:
            record = records[-1]
            self.ready, self.first_step, self.stopped = record.ready, record.first_step or 0, record.state == "stopped"

    @property
    def message(self) -> str:
        """The message with which it ended, or its last line."""
        texts = [line.text for line in self.lines]
        return next((text for text in reversed(texts) if text.startswith("miles-spmd: ")), (texts or ["no output"])[-1])

    def reports(self, since: float, until: float) -> list[Line]:
        """Return the lines about errors, warnings and requests to stop that were printed meanwhile."""
        reports = re.compile(r"^miles-spmd: |: stopping: ")
        return [line for line in self.lines if since <= line.time < until and reports.search(line.text)]

    def damage(self, step: int) -> list[Line]:
        """Return the lines by which the launch did not continue from the checkpoint of this step."""
        name = f"step_{step:06d}"
        return [line for line in self.lines if "continuing from" in line.text and name in line.text]

    def steps(self) -> list[dict[str, Any]]:
        """Return the metrics of the steps that were completed in this launch."""
        ready, first = self.ready, self.first_step
        return [] if ready is None else [row for row in self.rows if row["time"] >= ready and row["step"] > first]


class Output:
    """What a launch prints, through a named pipe, and into ``file`` from there: a fault by which processes can write no
    file must not keep them from printing. Raises OSError."""

    def __init__(self, file: Path) -> None:
        self._folder = contextlib.ExitStack()
        self.pipe = self._folder.enter_context(made_by_launcher()) / "output"
        os.mkfifo(self.pipe)
        self._reader = os.open(self.pipe, os.O_RDONLY | os.O_NONBLOCK)
        self._path, self._file, self._rest = file, file.open("wb", buffering=0), b""

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._reader)
        self._file.close()
        self._folder.close()

    def read(self) -> list[str]:
        """Return the whole lines since the last call."""
        with naming(self._path), contextlib.suppress(BlockingIOError):  # nothing new
            while content := os.read(self._reader, 1 << 16):
                self._file.write(content)
                self._rest += content
        *lines, self._rest = self._rest.split(b"\n")
        return [line.decode(errors="replace") for line in lines]


class Processes:
    """The processes of a launch, dead or alive: its launcher, what descends from it, and what has ``mark`` in its
    environment. Leaving the block kills those that live."""

    def __init__(self, launcher: int, mark: str) -> None:
        self._launcher, self._mark = launcher, mark
        self._known: dict[int, psutil.Process] = {}
        self.look()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.look()
        self._look_for_mark()
        end = time.monotonic() + KILLED
        while (alive := self._alive()) and time.monotonic() < end:
            for one in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            time.sleep(LOOK_EVERY)
            self._look_for_mark()  # one that is killed may have started another meanwhile

    def look(self) -> None:
        """Take note of what descends from the launcher: it is found no more when the launcher has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._launcher)
            for one in [root, *root.children(recursive=True)]:
                self._known.setdefault(one.pid, one)

    def wait(self, seconds: float) -> list[str]:
        """Wait until none is alive, and describe those that are after ``seconds``."""
        self._look_for_mark()
        end = time.monotonic() + seconds
        while (left := self._alive()) and time.monotonic() < end:
            time.sleep(LOOK_EVERY)
        return [f"pid {one.pid}: {_command(one)}" for one in left]

    def _look_for_mark(self) -> None:
        """A process may have begun when its parent died."""
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if one.environ().get(VARIABLE) == self._mark:
                    self._known.setdefault(one.pid, one)

    def _alive(self) -> list[psutil.Process]:
        return [one for one in self._known.values() if _lives(one)]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> str:
    try:
        return printable(" ".join(process.cmdline()), 100)
    except psutil.Error:
        return "ended meanwhile"
