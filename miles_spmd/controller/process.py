"""The controller's process: what runs inside it, from the order of rank 0 to the exit status.

Rank 0 starts it with one end of a pipe (:mod:`miles_spmd.worker.controller_process` holds the other). Through the pipe
come the order and, if rank 0 has to stop, the reason; the controller replies with the credentials of the run. When one
of the two processes dies, by whatever signal, its end of the pipe closes and the other exits. The controller leads a
process group of its own, so that the launcher's signals do not interrupt its last message, and so that everything that
it started can be ended with it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import msgspec

from miles_spmd.config import Config
from miles_spmd.config.load import config_digest
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.cluster.listener import WorkerError
from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.protocol.pipe import EXIT_SECONDS, Order
from miles_spmd.protocol.router import Router


class Stopped(BaseException):
    """Raised in the main thread, at whatever point, when the run has to end. The text is the reason.

    Not an Exception: code that handles errors of a reward or a rank must not catch it.
    """


class _Launcher:
    """Rank 0, from the controller's side. Turns its message, its death, and signals into :class:`Stopped`."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._reason = ""
        os.set_inheritable(pipe.fileno(), False)
        os.register_at_fork(after_in_child=pipe.close)  # a copy in a forked reward process would keep the pipe open

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            self._reason = self._pipe.recv_bytes().decode()
        except (EOFError, ConnectionResetError):
            self._reason = "rank 0 died"
        # Only a signal interrupts the main thread wherever it is: in poll, in a reward's future, in a file.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        threading.Event().wait(EXIT_SECONDS)
        os.killpg(0, signal.SIGKILL)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_IGN)  # a second signal must not interrupt the exit
        raise Stopped(self._reason or f"stopped by {signal.Signals(number).name}")

    @property
    def gone(self) -> bool:
        return self._reason == "rank 0 died"


def main(descriptor: int) -> int:
    """Run the controller at the end of the pipe ``descriptor``. Returns the exit status: 0, or 1 after one message on
    stderr."""
    pipe = Connection(descriptor)
    order = msgspec.json.decode(pipe.recv_bytes(), type=Order)
    config = Config.model_validate_json(order.config)
    launcher = _Launcher(pipe)
    PlugPoint.time_limit = config.deadlines.train_timeout
    log = config.run_dir / "logs" / "controller.log"
    with Router(order.host) as router:
        pipe.send_bytes(msgspec.json.encode(router.credentials))
        cluster = Cluster(router, order.world_size, config.deadlines, config_digest(config), log.parent)
        try:
            try:
                launcher.listen()
                from miles_spmd.controller.tasks import run  # imports much, while the workers do the same

                run(config, cluster, order.task, order.replay)
                cluster.stop()
                return 0
            except Exception as error:
                problem = _explain(error, cluster.place, log)
        except Stopped as stopped:
            problem = cluster.explain(str(stopped))
    print(f"miles-spmd: {problem}", file=sys.stderr, flush=True)
    if launcher.gone:
        os.killpg(0, signal.SIGKILL)  # no other process is left to end what this one started
    return 1


def _explain(error: Exception, place: str, log: Path) -> str:
    """Return one message for the terminal; write the traceback to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        traceback.print_exception(error, file=file)
        if isinstance(error, WorkerError):
            file.write(error.details)
    if isinstance(error, WorkerError):
        return f"{error}" + (f" (traceback in {log})" if error.details else "")
    return f"{place}: {type(error).__name__}: {error} (traceback in {log})"
