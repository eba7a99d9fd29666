"""What a fault does to processes and files of this machine."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Collection
from pathlib import Path

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
RUNNING = 0.002  # seconds in which a slow process runs at a time: less than a step of any engine
SLOWER = 5


def send(pid: int, number: signal.Signals) -> None:
    """Send the signal; a process that has ended does not need it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Slowness(threading.Thread):
    """Makes the process ``pid`` SLOWER times as slow, until :meth:`end`: it runs for moments, and is suspended for
    SLOWER - 1 times as long after each."""

    def __init__(self, pid: int) -> None:
        super().__init__(name="slowness", daemon=True)
        self._pid, self._over = pid, threading.Event()
        self.start()

    def run(self) -> None:
        while True:
            began = time.monotonic()
            if self._over.wait(RUNNING):
                return
            send(self._pid, signal.SIGSTOP)
            time.sleep((SLOWER - 1) * (time.monotonic() - began))  # a busy machine makes a moment longer
            send(self._pid, signal.SIGCONT)

    def end(self) -> None:
        self._over.set()
        self.join()


class FullDisk:
    """No file of the processes ``pids`` can grow, until :meth:`end`: their limit of a file's size is 0. A write then
    fails with EFBIG, which a run treats like a full disk."""

    def __init__(self, pids: Collection[int]) -> None:
        self._limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
        for pid, (_, hard) in self._limits.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))

    def end(self) -> None:
        for pid, limits in self._limits.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def flip_bit(folder: Path) -> Path:
    """Flip a bit in the middle of the largest file below ``folder``, and return that file."""
    file = max((path for path in sorted(folder.rglob("*")) if path.is_file()), key=lambda path: path.stat().st_size)
    with file.open("r+b") as opened:
        at = file.stat().st_size // 2
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 1]))
    return file
