"""The controller's process: how rank 0 starts it and hears of its end, and what runs inside.

A pipe joins the two. Rank 0 sends the order, the controller answers with the way in, and rank 0 may say why it has to
stop. When either dies, by whatever signal, its end of the pipe closes and the other leaves. The controller leads a
process group of its own, so that the launcher's signals do not cut its last words short, and so that whoever survives
can end everything that the controller started.
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

from miles_spmd.config.load import config_digest
from miles_spmd.config.schema import Config
from miles_spmd.controller.cluster.cluster import Cluster, WorkerError
from miles_spmd.protocol.order import LAST_WORDS, Order
from miles_spmd.protocol.router import Router

# --- rank 0's side ---------------------------------------------------------------------------------------------------


# --- the controller's side -------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """Raised in the main thread, wherever it is, when the run has to end. Says why."""


class _Launcher:
    """Rank 0 as the controller sees it. Turns its word, its death, and signals into :class:`Stopped`."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._reason = ""
        os.set_inheritable(pipe.fileno(), False)
        os.register_at_fork(after_in_child=pipe.close)  # or a forked reward process would keep it open

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            self._reason = self._pipe.recv_bytes().decode()
        except (EOFError, ConnectionResetError):
            self._reason = "rank 0 died"
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        threading.Event().wait(LAST_WORDS)
        os.killpg(0, signal.SIGKILL)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_IGN)  # once is enough: the way out is not to be interrupted
        raise Stopped(self._reason or f"stopped by {signal.Signals(number).name}")

    @property
    def gone(self) -> bool:
        return self._reason == "rank 0 died"


def main(descriptor: int) -> int:
    """Returns the exit status: 0, or 1 after one message on stderr."""
    pipe = Connection(descriptor)
    order = msgspec.json.decode(pipe.recv_bytes(), type=Order)
    config = Config.model_validate_json(order.config)
    launcher = _Launcher(pipe)
    log = config.run_dir / "logs" / "controller.log"
    with Router(order.host) as router:
        pipe.send_bytes(msgspec.json.encode(router.credentials))
        workers = Cluster(router, order.world_size, config.deadlines, config_digest(config), log.parent)
        try:
            try:
                launcher.listen()
                from miles_spmd.controller.tasks import run  # imports much, while the workers do the same

                run(config, workers, order.task, order.replay)
                workers.stop()
                return 0
            except Exception as error:
                problem = _explain(error, workers.place, log)
        except Stopped as stopped:
            problem = workers.explain(str(stopped))
    print(f"miles-spmd: {problem}", file=sys.stderr, flush=True)
    if launcher.gone:
        os.killpg(0, signal.SIGKILL)  # nobody else is left to end what this process started
    return 1


def _explain(error: Exception, place: str, log: Path) -> str:
    """One message for the terminal; the traceback goes to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        traceback.print_exception(error, file=file)
        if isinstance(error, WorkerError):
            file.write(error.details)
    if isinstance(error, WorkerError):
        return f"{error}" + (f" (traceback in {log})" if error.details else "")
    return f"{place}: {type(error).__name__}: {error} (traceback in {log})"
