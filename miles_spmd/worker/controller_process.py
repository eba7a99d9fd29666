"""The controller as the child process of rank 0: how rank 0 starts it and hears of its end.

A pipe joins the two. Rank 0 sends the order, the controller answers with the way in, and rank 0 may say why it has to
stop. When either dies, by whatever signal, its end of the pipe closes and the other leaves. The controller leads a
process group of its own, so that the launcher's signals do not cut its last words short, and so that whoever survives
can end everything that the controller started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Pipe

import msgspec

from miles_spmd.config import Config
from miles_spmd.protocol.credentials import Credentials
from miles_spmd.protocol.order import Order, Replay

CLEAN_UP = 1.0  # seconds for what a controller has left behind to end by itself


class ControllerProcess:
    """The controller as rank 0's child. Start it before importing torch: both then import side by side."""

    def __init__(self, config: Config, task: str, host: str, world_size: int, replay: Replay | None = None) -> None:
        self._pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "miles_spmd.controller", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._pipe.send_bytes(msgspec.json.encode(Order(config.model_dump_json(), task, host, world_size, replay)))
        self.pid = self._process.pid
        self.listening = False

    def credentials(self) -> Credentials:
        """Waits until the controller listens. Raises EOFError when it died first."""
        credentials = msgspec.json.decode(self._pipe.recv_bytes(), type=Credentials)
        self.listening = True
        return credentials

    def fileno(self) -> int:
        """Readable, from ``listening`` on, once the controller is gone."""
        return self._pipe.fileno()

    def tell(self, reason: str) -> None:
        """Ask it to stop, and why."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send_bytes(reason.encode())

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status (negative: the signal that killed it). After ``timeout`` seconds it is killed. Whatever else
        it started is gone, too, on return."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            self._end_group()

    def _end_group(self) -> None:
        """Its reward processes die with it, and multiprocessing's tracker cleans up behind them; give it the time."""
        end = time.monotonic() + CLEAN_UP
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < end:
                os.killpg(self.pid, 0)
                time.sleep(0.01)
            os.killpg(self.pid, signal.SIGKILL)
