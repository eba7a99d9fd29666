"""The controller as the child process of rank 0: how rank 0 starts it, stops it, and notices its end.

A pipe joins the two; :mod:`miles_spmd.controller.process` describes what goes through it and what its closing means.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Pipe

import msgspec

from miles_spmd.config import Config
from miles_spmd.processes import session
from miles_spmd.protocol.pipe import EXIT_SECONDS, Credentials, End, Order, Replay, ToController, ToSupervisor

CLEAN_UP = 1.0  # seconds for processes that the controller has left behind to end by themselves


class ControllerProcess:
    """The controller as rank 0's child. Start it before importing torch: the two processes then import in parallel."""

    def __init__(self, config: Config, task: str, host: str, world_size: int, replay: Replay | None = None) -> None:
        self._pipe, theirs = Pipe()
        with blocked(signal.SIGTERM, signal.SIGUSR1):  # requests wait until the controller takes them
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

    def credentials(self) -> list[Credentials]:
        """Wait until the controller listens and return the ranks' credentials. Raises EOFError when it died first."""
        credentials = msgspec.json.decode(self._pipe.recv_bytes(), type=list[Credentials])
        self.listening = True
        return credentials

    def send(self, message: ToController) -> None:
        """Raises OSError where the controller is gone."""
        self._pipe.send_bytes(msgspec.json.encode(message))

    def orders(self) -> Iterator[ToSupervisor]:
        """Yield the controller's orders to the supervisor, until the controller is gone."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                yield msgspec.json.decode(self._pipe.recv_bytes(), type=ToSupervisor)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def fileno(self) -> int:
        """The pipe's descriptor. From ``listening`` on, it becomes readable only when the controller is gone."""
        return self._pipe.fileno()

    def stop(self, reason: str) -> str:
        """Request the controller to stop, and wait for its end. ``reason`` is for its last message. Returns "" where it
        printed one, else why it did not."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send(End(reason))
        return self.killed(self.wait(2 * EXIT_SECONDS))

    def killed(self, status: int) -> str:
        """Return in words by what the controller was killed, "" where it ended by itself and has spoken."""
        return f"the controller (pid {self.pid}) was killed by {signal.Signals(-status).name}" if status < 0 else ""

    def kill(self) -> None:
        """Kill the controller and all that it started, without waiting: a file system may hold it for ever."""
        for pid in session.members(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, kill the controller after ``timeout`` seconds, and return its exit status (negative: the
        signal that killed it). Everything else that it started has ended, too, on return."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            self._end_session()

    def _end_session(self) -> None:
        """Wait for the rest of the controller's session, then kill it: its reward processes end with it, and
        multiprocessing's resource tracker removes what they left."""
        end = time.monotonic() + CLEAN_UP
        while session.members(self.pid):
            if time.monotonic() > end:
                session.kill(self.pid)
            time.sleep(0.01)


@contextlib.contextmanager
def blocked(*signals: signal.Signals) -> Iterator[None]:
    """For the block, these signals wait; for a process that is started in it, until it unblocks them itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
