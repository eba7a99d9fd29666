"""A worker's side thread: reports that the process is alive and where it is, and ends it when the run is over.

It runs while the main thread is in a collective or an engine step, because those release the GIL. Signals are handled
here, too: Python's handlers run in the main thread, which in a collective may not come back to the interpreter for an
hour. The C-level wakeup descriptor receives a byte for each signal at once, and this thread polls it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

import psutil
import zmq

from miles_spmd.config.run import HEARTBEAT_EVERY
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.last_words import say
from miles_spmd.protocol.messages import Heartbeat, Held, HoldPasses, Overdue, ReleasePasses, StopNotice
from miles_spmd.protocol.pipe import EXIT_SECONDS, LAUNCHER, REQUEUE, SUPERVISOR, Credentials
from miles_spmd.training.passes import PASSES
from miles_spmd.types.phase import Phase
from miles_spmd.types.printable import MAX_LINE, printable
from miles_spmd.worker import flight_recorder
from miles_spmd.worker.controller_process import ControllerProcess

LOST_GRACE = 3.0  # seconds from the end of the controller's connection, in which the launcher may stop this rank
STUCK_GRACE = 20.0  # seconds from there in which a controller that lives may write how its run ended
REQUESTS = signal.SIGTERM, signal.SIGUSR1  # to stop, after what is worth it was saved; SIGINT ends a run at once
FRAMES = 12  # of the main thread, for the controller
PACKAGE = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Doing:
    """What the main thread is doing. Replaced as a whole, so that the side thread never reads half of a change."""

    phase: Phase
    step: int
    deadline: float = math.inf  # monotonic


@dataclass(frozen=True)
class EngineStep:
    """A step of the engine that the main thread has begun, which is due ``seconds`` later, at ``deadline``
    (monotonic)."""

    seconds: float
    deadline: float


class Watchdog(threading.Thread):
    """``terminal`` receives warnings and the last line of a worker that ends on its own; ``stacks`` the stack of every
    thread when a deadline is missed. ``controller`` is given on rank 0, whose child it is.

    ``beside_controller``: on a rank of the first node, whose other processes know better why the controller is gone.

    Construct it in the main thread: it takes over SIGTERM, SIGUSR1 and SIGINT.
    """

    def __init__(
        self,
        rank: int,
        terminal: TextIO,
        stacks: Path,
        controller: ControllerProcess | None,
        *,
        beside_controller: bool = False,
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._detail = ""
        self._doing = Doing(Phase.START, 0)
        self._engine_step: EngineStep | None = None
        self._rank, self._terminal, self._stacks, self._controller = rank, terminal, stacks, controller
        self._silent_loss = beside_controller
        self._parent = int(os.environ.get(LAUNCHER) or os.getppid())
        self._supervisor = int(os.environ.get(SUPERVISOR, 0))  # of a cell
        self._dealer: Dealer | None = None
        self._lost_since: float | None = None  # monotonic: when the connection to the controller closed
        self._stuck_grace = STUCK_GRACE
        self._stopping = False
        self._asked = False  # a signal has requested a stop
        self._main = threading.main_thread().ident or 0
        self._awake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in (*REQUESTS, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # a handler has to exist; the wakeup descriptor does the rest

    # --- for the main thread -----------------------------------------------------------------------------------------

    def connect(self, credentials: Credentials, silence: float, stacks: Path | None = None) -> None:
        """Send heartbeats from now on. The controller counts as lost after ``silence`` seconds without its machine.
        ``stacks``: where they go from now on."""
        self._stacks = stacks or self._stacks
        self._stuck_grace = min(STUCK_GRACE, silence)
        self._dealer = Dealer(credentials, silence)
        self._waker.send(b"\0")

    def enter(self, phase: Phase, step: int, seconds: float = math.inf) -> None:
        """The main thread begins something that is due in ``seconds``."""
        self._detail = ""
        self._doing = Doing(phase, step, time.monotonic() + seconds)
        self._waker.send(b"\0")

    def progress(self, detail: str) -> None:
        """The main thread's progress, for the next heartbeat."""
        self._detail = detail

    def begin_engine_step(self, seconds: float) -> None:
        """The main thread begins a step of the engine, which is due in ``seconds``. Does not wake the side thread,
        which looks at it with the next heartbeat: there may be a thousand steps in a second."""
        self._engine_step = EngineStep(seconds, time.monotonic() + seconds)

    def end_engine_step(self) -> None:
        self._engine_step = None

    def warn(self, text: str) -> None:
        """Print a warning into the log and, on rank 0, to the terminal: most warnings are the same on all ranks."""
        print(f"warning: {text}", flush=True)
        if self._rank == 0:
            print(
                f"miles-spmd: warning: rank 0 ({socket.gethostname()}): {printable(text, MAX_LINE)}",
                file=self._terminal,
                flush=True,
            )

    def stop(self) -> None:
        """End the thread: from now on the end of the controller, or of this process, is expected."""
        self._stopping = True
        self._waker.send(b"\0")
        self.join()

    def disconnect(self) -> None:
        """Call it after :meth:`stop` and the last reply: until then a closed connection means that the process died."""
        if self._dealer is not None:
            self._dealer.close()

    # --- the side thread ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        dumped: Doing | None = None  # what the stacks were written for: once for each missed deadline
        reported: EngineStep | None = None
        while not self._stopping:
            now, doing, engine_step = time.monotonic(), self._doing, self._engine_step
            if now >= doing.deadline and dumped is not doing:
                dumped = doing
                self._dump_stacks()
                self._report_overdue()
            if engine_step is not None and now >= engine_step.deadline and reported is not engine_step:
                reported = engine_step
                self._dump_stacks()
                self._report_overdue(engine_step.seconds)
            self._send_heartbeat(doing.phase)
            self._listen(min(now + HEARTBEAT_EVERY, math.inf if dumped is doing else doing.deadline))
            if os.getppid() != self._parent:  # an orphan is adopted by another process
                self._leave("the launcher died")
            if self._supervisor and not _is_alive(self._supervisor):
                self._leave("the supervisor died")
            if self._lost_since is not None and time.monotonic() > self._lost_since + self._grace:
                self._lost()

    @property
    def _grace(self) -> float:
        """The seconds from the end of the controller's connection to that of this rank. On rank 0 its pipe is open: it
        writes its last files, or is suspended, or waits for a file for ever. A launcher that stops rank 0 meanwhile,
        because others have ended, leaves it 30 seconds."""
        if self._controller is not None:
            return self._stuck_grace
        return 0.0 if self._asked else LOST_GRACE  # the launcher stops this rank, or a stopping run has ended

    def _listen(self, until: float) -> None:
        """Wait until then, or until something happens."""
        poller = zmq.Poller()
        poller.register(self._awake, zmq.POLLIN)
        # Rank 0 learns from its child's pipe, with the exit status, that the controller is gone; other ranks from the
        # connection, which may close a moment before the launcher stops them with the better message. The connection
        # also ends when the controller is silent, whose pipe then stays open.
        if self._dealer is not None:
            poller.register(self._dealer.incoming, zmq.POLLIN)
        if self._controller is not None and self._controller.listening:
            poller.register(self._controller.fileno(), zmq.POLLIN)
        if self._dealer is not None and self._lost_since is None:
            poller.register(self._dealer.disconnections, zmq.POLLIN)
        ready = dict(poller.poll(math.ceil(max(0.0, until - time.monotonic()) * 1000)))
        if self._stopping:
            return
        if self._awake.fileno() in ready:
            for number in filter(None, self._awake.recv(64)):
                self._signalled(signal.Signals(number))
        if self._dealer is not None and self._dealer.incoming in ready:
            obey(self._rank, self._dealer)
        if self._controller is not None and self._controller.fileno() in ready:
            self._controller_ended(self._controller)
        if self._dealer is not None and self._dealer.disconnections in ready:
            self._lost_since = time.monotonic()

    def _signalled(self, received: signal.Signals) -> None:
        """Pass a request to stop on to the controller, which goes on with the run as far as is worth it. Leave at once
        by another signal, or where there is nothing to pass it to yet."""
        if received not in REQUESTS or self._dealer is None:
            self._leave(f"stopped by {received.name}", REQUEUE if received in REQUESTS else 1)
        self._asked = True
        self._dealer.try_send(StopNotice(self._rank, received.name))

    def _send_heartbeat(self, phase: Phase, detail: str = "") -> None:
        if self._dealer is not None:
            detail = detail or ", ".join(filter(None, [self._detail, where(self._main)]))
            self._dealer.try_send(Heartbeat(self._rank, phase, self._doing.step, detail))

    def _dump_stacks(self) -> None:
        with contextlib.suppress(OSError), self._stacks.open("a") as file:  # this thread has to live on a full disk
            file.write(f"--- {time.strftime('%F %T')} {self._doing.phase}, step {self._doing.step}: deadline missed\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _report_overdue(self, engine_step: float = 0.0) -> None:
        """Tell the controller where this rank stands, and write the record of its collectives beside its stacks.
        ``engine_step``: the limit in seconds that a step of the engine has exceeded."""
        if self._dealer is None:
            return
        record = flight_recorder.read() if "torch" in sys.modules else {}
        groups = flight_recorder.groups(record, self._rank)
        self._dealer.try_send(Overdue(self._rank, frames(self._main)[:FRAMES], groups, engine_step))
        record["entries"] = record.get("entries", [])[-flight_recorder.KEPT :]
        with contextlib.suppress(OSError):
            self._stacks.with_suffix(".collectives.json").write_text(json.dumps(record))

    # --- ends --------------------------------------------------------------------------------------------------------

    def _leave(self, reason: str, status: int = 1) -> NoReturn:
        """End after a signal or the launcher's death. The controller prints the reason, once for all ranks."""
        self._send_heartbeat(Phase.STOP, reason)
        self._exit(status, "" if self._controller is None else self._controller.stop(reason))

    def _lost(self) -> NoReturn:
        """End after the controller's connection has ended; on rank 0 together with a controller that does not."""
        if self._controller is None:
            self._exit(1, "" if self._silent_loss else "lost the controller")
        self._controller.kill()
        self._exit(1, f"the controller (pid {self._controller.pid}) was silent, and was killed")

    def _controller_ended(self, controller: ControllerProcess) -> NoReturn:
        status = controller.wait(EXIT_SECONDS)
        self._exit(max(status, 1), controller.killed(status))

    def _exit(self, status: int, line: str = "") -> NoReturn:
        if self._dealer is not None:
            self._dealer.close()  # waits until a last heartbeat is sent
        if line:
            doing = self._doing
            place = doing.phase if doing.phase is Phase.START else f"{doing.phase}, step {doing.step}"
            say(f"rank {self._rank} ({socket.gethostname()}), {place}: {line}", self._terminal)
        self._terminal.flush()
        sys.stdout.flush()
        os._exit(status)


def _is_alive(pid: int) -> bool:
    """Return whether an older process than this one, which had that number, is alive."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= psutil.Process().create_time()
    return False


def obey(rank: int, dealer: Dealer) -> None:
    """Hold the main thread before its next forward pass, or let it go on, as the controller says."""
    match dealer.receive(0):
        case HoldPasses():
            dealer.try_send(Held(rank, *PASSES.hold()))
        case ReleasePasses(limit):
            PASSES.release(limit)


def where(thread: int) -> str:
    """Return where that thread is: its innermost frame, and the innermost one of this package if that is another."""
    places: list[str] = []
    for frame, line in traceback.walk_stack(sys._current_frames().get(thread)):
        ours = frame.f_code.co_filename.startswith(PACKAGE)
        if ours or not places:
            places.append(_place(frame, line))
        if ours:
            break
    return " in ".join(places)


def frames(thread: int) -> list[str]:
    """Return where that thread is, its innermost frame first."""
    return [_place(frame, line) for frame, line in traceback.walk_stack(sys._current_frames().get(thread))]


def _place(frame: FrameType, line: int) -> str:
    return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{line})"
