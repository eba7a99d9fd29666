"""A run with real processes, which tests hold in a known phase, hurt, and look at."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests import forked

REPOSITORY = Path(__file__).parents[2]
START_SECONDS, END_SECONDS = 120, 20  # generous: other tests may use the machine


class Launched:
    """One run: with a ``deed`` under torchrun and held.py, without one by ``miles-spmd train``. Its processes are
    forked from one with all imports, or ``preloaded`` is false and it starts as a user starts it. They are found by
    their working directory, which each inherits."""

    def __init__(
        self,
        folder: Path,
        config: Path,
        *deed: str,
        preloaded: bool = True,
        ranks: int = 2,
        file_kib: int = 0,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.run_dir = folder, folder / "runs" / "tiny"
        command = ["-m", "miles_spmd", "train", str(config), "--nproc-per-node", str(ranks)]
        if deed:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            command = [*torchrun, str(Path(__file__).with_name("held.py")), str(config), *deed]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HELD_FILE": str(folder / "held")}
        environment |= variables or {}
        self.launcher: forked.Program | subprocess.Popen[bytes]
        if preloaded:
            streams = folder / "stdout", folder / "stderr"
            self.launcher = forked.start(command, folder, environment, *streams, file_kib=file_kib)
            return
        with (folder / "stderr").open("wb") as stderr, (folder / "stdout").open("wb") as stdout:
            assert not file_kib
            self.launcher = subprocess.Popen(
                [sys.executable, *command],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """All living processes of this run."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if entry.name.isdigit() and os.readlink(entry / "cwd") == str(self.folder):
                    found.append(int(entry.name))
        return found

    def controller(self) -> int | None:
        for pid in self.processes():
            if b"miles_spmd.controller" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        return None

    def wait_until_held(self) -> int:
        """The process that says so."""
        held = self.folder / "held"
        self._wait_for(lambda: held.exists() or self.launcher.poll() is not None, START_SECONDS)
        assert held.exists(), self.report()
        return int(held.read_text())

    def wait_for_steps(self, steps: int) -> None:
        metrics = self.run_dir / "metrics.jsonl"
        self._wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > steps, START_SECONDS)

    def wait_for_process(self, rank: int | None) -> int:
        """The process of this rank as soon as there is one; None: the controller."""

        def look() -> list[int]:
            found = []
            for pid in self.processes():
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    command, environment = (Path(f"/proc/{pid}/{n}").read_bytes() for n in ("cmdline", "environ"))
                    of_rank = b"miles_spmd\0train" in command and f"\0RANK={rank}\0".encode() in environment
                    if of_rank or (rank is None and b"miles_spmd.controller" in command):
                        found.append(pid)
            return found

        self._wait_for(lambda: bool(look()), START_SECONDS)
        return look()[0]

    def wait_for_ranks(self) -> list[int]:
        """The processes of all ranks as soon as they take care of signals."""
        found: dict[int, int] = {}

        def look() -> bool:
            for log in self.run_dir.glob("logs/**/rank-*.log"):
                started = re.match(r"--- .* pid (\d+)\n", log.read_text())
                if started:
                    status = Path(f"/proc/{started[1]}/status").read_text()
                    caught = re.search(r"SigCgt:\s*(\w+)", status)
                    assert caught
                    if int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
                        found[int(log.name.removeprefix("rank-").split(".")[0])] = int(started[1])
            return len(found) == 2

        self._wait_for(look, START_SECONDS)
        return [found[0], found[1]]

    def finish(self, seconds: float = END_SECONDS) -> str:
        """Waits for the end; checks what holds for every failure; returns the one message."""
        status = self.launcher.wait(seconds)
        assert status != 0, self.report()
        self.wait_for_end()
        lines = [line for line in self.stderr().splitlines() if line.startswith("miles-spmd: ")]
        assert len(lines) == 1, self.report()
        metrics = self.run_dir / "metrics.jsonl"
        if metrics.exists():  # each line whole, however the run ended
            assert all(isinstance(json.loads(line), dict) for line in metrics.read_text().splitlines())
        return lines[0].removeprefix("miles-spmd: ")

    def wait_for_end(self, seconds: float = 5) -> None:
        """Of all processes, a moment after the launcher's."""
        self._wait_for(lambda: not self.processes(), seconds)

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def report(self) -> str:
        logs = sorted(self.run_dir.glob("logs/attempt_*/*"))
        return "\n".join([self.stderr(), *(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)])

    def _wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{self.processes()}\n{self.report()}"
            time.sleep(0.05)

    def clean_up(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.launcher.wait()


Launch = Callable[..., Launched]
