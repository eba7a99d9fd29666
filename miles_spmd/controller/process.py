"""The controller's process: what runs inside it, from the order of who starts it to the exit status.

Rank 0, or the supervisor of cells, starts it with one end of a pipe (:mod:`miles_spmd.worker.controller_process` holds
the other). Through the pipe come the order and, if the run has to stop, the reason; the controller replies with the
credentials of the run. When one of the two processes dies, by whatever signal, its end of the pipe closes and the other
exits. The controller leads a process group of its own, so that the launcher's signals do not interrupt its last
message, and so that everything that it started can be ended with it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import msgspec

from miles_spmd.config import Config
from miles_spmd.config.load import config_digest
from miles_spmd.controller import attempts
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.cluster.errors import WorkerError, WorkerStoppedError
from miles_spmd.controller.journal.stopping import GRACE, Stopping
from miles_spmd.controller.run_folder import outcome
from miles_spmd.models.random import write_random_checkpoints
from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.processes import session
from miles_spmd.protocol.last_words import say
from miles_spmd.protocol.pipe import EXIT_SECONDS, REQUEUE, CellEnded, End, Order, ToController, ToSupervisor
from miles_spmd.protocol.router import Router
from miles_spmd.types.files import with_remedy
from miles_spmd.types.secrets import scrub, scrubbed

SIGNALS = (signal.SIGINT, *(signal.Signals[name] for name in GRACE))


class Stopped(BaseException):
    """Raised in the main thread, at whatever point, when the run has to end. The text is the reason.

    Not an Exception: code that handles errors of a reward or a rank must not catch it.
    """


class _Launcher:
    """Who has started the controller, from its side. Turns its message, its death, and SIGINT into :class:`Stopped`,
    and the other signals into requests to stop."""

    def __init__(self, pipe: Connection, stopping: Stopping, name: str) -> None:
        self._pipe, self._stopping, self.died = pipe, stopping, f"{name} died"
        self._reason = ""
        self._cell_ended: Callable[[CellEnded], None] = lambda ended: None
        self.stopped: Stopped | None = None  # what was raised
        self._interrupt: Callable[[BaseException], None] | None = None
        os.set_inheritable(pipe.fileno(), False)
        os.register_at_fork(after_in_child=pipe.close)  # a copy in a forked reward process would keep the pipe open

    def listen(self, cluster: Cluster) -> None:
        """From now on, a reason to stop is raised in the main thread, through ``cluster``, and a request is taken."""
        self._interrupt, self._cell_ended = cluster.interrupt, cluster.cells.ended
        signal.signal(signal.SIGINT, self._stop)
        for name in GRACE:
            signal.signal(signal.Signals[name], lambda number, frame: self._stopping.ask(signal.Signals(number).name))
        self._stopping.end = self.end
        self._stopping.watch()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # rank 0 has started this process with some blocked
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                message = msgspec.json.decode(self._pipe.recv_bytes(), type=ToController)
            except (EOFError, ConnectionResetError):
                message = End(self.died)
            match message:
                case CellEnded():
                    self._cell_ended(message)
                case End(reason):
                    self.end(reason)
                    return

    def order(self, order: ToSupervisor) -> None:
        """Let the supervisor start a cell again, or prepare it."""
        with suppress(OSError):  # it has died, which ends the run
            self._pipe.send_bytes(msgspec.json.encode(order))

    def end(self, reason: str) -> None:
        """Raise Stopped in the main thread, from another one, and kill this process where it does not end."""
        self._reason = self._reason or reason
        # Only a signal interrupts the main thread wherever it is: in poll, in a reward's future, in a file.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        threading.Event().wait(EXIT_SECONDS)
        session.kill(os.getpid())

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.ignore()  # a second signal must not interrupt the exit
        assert self._interrupt is not None
        self.stopped = Stopped(self._reason or f"stopped by {signal.Signals(number).name}")
        self._interrupt(self.stopped)

    @staticmethod
    def ignore() -> None:
        """From now on, signals do not interrupt the main thread."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    @property
    def gone(self) -> bool:
        return self._reason == self.died

    @property
    def requested(self) -> bool:
        """Whether the reason is a request to stop, whoever received it."""
        return bool(self._stopping.source) or self._reason in [f"stopped by {name}" for name in GRACE]


def main(descriptor: int) -> int:
    """Run the controller at the end of the pipe ``descriptor``. Returns the exit status: 0, or after one message on
    stderr REQUEUE where the run was asked to stop and can be continued, and 1 otherwise."""
    pipe = Connection(descriptor)
    sys.stdout, sys.stderr = scrubbed(sys.stdout), scrubbed(sys.stderr)
    try:
        order = msgspec.json.decode(pipe.recv_bytes(), type=Order)
    except (EOFError, OSError):  # rank 0 died, of which its launcher speaks
        return 1
    config = Config.model_validate_json(order.config)
    stopping = Stopping(config.run_dir)
    stopping.show = lambda text: print(f"{config.run.name}: {text}", flush=True)
    launcher = _Launcher(pipe, stopping, "rank 0" if config.resilience.cells == 1 else "the supervisor")
    PlugPoint.time_limit = config.deadlines.train_timeout
    try:
        attempt = attempts.begin(config.run_dir, order.task, order.world_size)
    except OSError as error:
        say(f"start: {error}; nothing can be written into {config.run_dir}")
        return 1
    log = attempt.folder / "controller.log"
    problem, status = "", 0
    state: attempts.State = "finished"
    with Router(order.host, order.world_size, str(attempt.folder)) as router:
        try:
            pipe.send_bytes(msgspec.json.encode(router.credentials))
        except OSError:  # of which its launcher speaks
            _conclude(attempt, "failed", f"start: {launcher.died}", config)
            return 1
        settings = config.deadlines, config_digest(config), attempt.folder
        cluster = Cluster(router, order.world_size, *settings, cells=config.resilience.cells)
        cluster.cells.configure(config.resilience, launcher.order)
        cluster.pass_requests(stopping.ask, lambda: bool(stopping.source))
        try:
            try:
                launcher.listen(cluster)
                write_random_checkpoints(config.checkpoints)
                from miles_spmd.controller.tasks import run  # imports much, while the workers do the same

                problem = run(config, cluster, attempt, stopping, order.replay)
                status, state = (REQUEUE, "stopped") if problem else (0, "finished")
                cluster.stop(status)
            except Exception as error:
                if launcher.stopped is not None:  # native code makes an error of its own of what it is interrupted by
                    raise launcher.stopped from error
                problem = _explain(error, cluster.place, log, order.task)
                status, state = 1, _state(error)
        except Stopped as stopped:
            cause = cluster.explain(str(stopped))
            problem, status, state = str(cause), 1, "failed" if launcher.gone else _state(cause)
            if launcher.requested and isinstance(cause, WorkerStoppedError):
                status = REQUEUE
        launcher.ignore()
    if problem:
        say(problem)
    _conclude(attempt, state, problem, config)
    if launcher.gone:
        session.kill(os.getpid())  # no other process is left to end what this one started
    return status


def _conclude(attempt: attempts.AttemptWriter, state: attempts.State, problem: str, config: Config) -> None:
    """Write how the attempt ended, and print what it leaves."""
    record = attempt.record
    if problem:
        attempt.tell(f"ended: {problem}")
    with _going_on():
        attempt.end(state, problem or state)
    for line in outcome(config, record.task, record.ranks, finished=not problem):
        print(line, flush=True)
        attempt.tell(line)
    with _going_on():
        attempt.close()


@contextmanager
def _going_on() -> Iterator[None]:
    """A run ends as it does, also where its record cannot be written; the next attempt completes it."""
    try:
        yield
    except OSError as error:
        print(f"no record:  {error}", flush=True)


def _state(error: Exception) -> attempts.State:
    return "stopped" if isinstance(error, WorkerStoppedError) else "failed"


def _explain(error: Exception, place: str, log: Path, task: str) -> str:
    """Return one message for the terminal; write the traceback to ``log``."""
    details = error.details if isinstance(error, WorkerError) else "".join(traceback.format_exception(error))
    where = f" (traceback in {log})" if details else ""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.writelines(map(scrub, traceback.format_exception(error)))
            file.write(scrub(error.details) if isinstance(error, WorkerError) else "")
    except OSError:  # where no other file can be written either
        where = ""
    text = f"{error}" if isinstance(error, WorkerError) else f"{place}: {type(error).__name__}: {error}"
    known = with_remedy(text)
    resume = ", and continue with checkpoint.resume=true" if known != text and task == "train" else ""
    return known + resume + where
