"""A worker's side thread: says that the process lives and where it is, and ends it when nobody needs it any more.

It works while the main thread sits in a collective or an engine step, since those give up the GIL; so signals are
handled here too, through the C-level wakeup descriptor.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

import zmq

from miles_spmd.protocol.credentials import Credentials
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.messages import Heartbeat
from miles_spmd.protocol.order import LAST_WORDS
from miles_spmd.types.phase import Phase
from miles_spmd.worker.controller_process import ControllerProcess

BEAT_EVERY = 1.0  # seconds
LOST_GRACE = 3.0  # seconds for the launcher to stop this rank after the controller's connection closed
PACKAGE = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Doing:
    """What the main thread is about, replaced as a whole so that the side thread never sees half of it."""

    phase: Phase
    step: int
    deadline: float | None = None  # monotonic


class Watchdog(threading.Thread):
    """``terminal`` takes the last line of a worker that ends without having been told to; ``stacks`` the stack of
    every thread when a deadline is missed. ``controller`` is given on rank 0, whose child it is.

    Make it in the main thread: it takes over SIGTERM and SIGINT.
    """

    def __init__(self, rank: int, terminal: TextIO, stacks: Path, controller: ControllerProcess | None) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._detail = ""
        self._doing = Doing(Phase.START, 0)
        self._rank, self._terminal, self._stacks, self._controller = rank, terminal, stacks, controller
        self._parent = os.getppid()
        self._dealer: Dealer | None = None
        self._lost_since: float | None = None  # monotonic: when the connection to the controller closed
        self._stopping = False
        self._main = threading.main_thread().ident or 0
        self._awake, waker = socket.socketpair()
        waker.setblocking(False)
        self._waker = waker
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # the byte in the wakeup descriptor says it all

    # --- for the main thread -----------------------------------------------------------------------------------------

    def connect(self, credentials: Credentials, silence: float) -> None:
        """Beat from now on. The controller counts as lost when its machine is silent for ``silence`` seconds."""
        self._dealer = Dealer(credentials, silence)
        self._waker.send(b"\0")

    def enter(self, phase: Phase, step: int, seconds: float | None) -> None:
        """The main thread begins something that is due in ``seconds``."""
        self._detail = ""
        self._doing = Doing(phase, step, None if seconds is None else time.monotonic() + seconds)
        self._waker.send(b"\0")

    def progress(self, detail: str) -> None:
        """How far the main thread is with what it does."""
        self._detail = detail

    def stop(self) -> None:
        """From now on the end of the controller, or of this process, is as it should be."""
        self._stopping = True
        self._waker.send(b"\0")
        self.join()

    def disconnect(self) -> None:
        """After :meth:`stop`, and after the last reply: until then a closed connection means a death."""
        if self._dealer is not None:
            self._dealer.close()

    # --- the side thread ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        dumped: Doing | None = None
        while not self._stopping:
            now, doing = time.monotonic(), self._doing
            if doing.deadline is not None and now >= doing.deadline and dumped is not doing:
                dumped = doing
                self._dump_stacks()
            self._beat(doing.phase)
            until = now + BEAT_EVERY
            if doing.deadline is not None and dumped is not doing:
                until = min(until, doing.deadline)
            self._listen(until)
            if os.getppid() != self._parent:
                self._leave("the launcher died")
            if self._lost_since is not None and time.monotonic() > self._lost_since + LOST_GRACE:
                self._exit(1, "lost the controller")

    def _listen(self, until: float) -> None:
        """Sleep until then, or until something happens."""
        poller = zmq.Poller()
        poller.register(self._awake, zmq.POLLIN)
        if self._controller is not None and self._controller.listening:
            poller.register(self._controller.fileno(), zmq.POLLIN)
        elif self._dealer is not None and self._lost_since is None:
            poller.register(self._dealer.disconnections, zmq.POLLIN)
        ready = dict(poller.poll(math.ceil(max(0.0, until - time.monotonic()) * 1000)))
        if self._stopping:
            return
        if self._awake.fileno() in ready:
            for number in self._awake.recv(64):
                if number:
                    self._leave(f"stopped by {signal.Signals(number).name}")
        if self._controller is not None and self._controller.fileno() in ready:
            self._controller_ended(self._controller)
        if self._dealer is not None and self._dealer.disconnections in ready:
            self._lost_since = time.monotonic()

    def _beat(self, phase: Phase, detail: str = "") -> None:
        if self._dealer is not None:
            detail = detail or ", ".join(filter(None, [self._detail, where(self._main)]))
            self._dealer.try_send(Heartbeat(self._rank, phase, self._doing.step, detail))

    def _dump_stacks(self) -> None:
        with self._stacks.open("a") as file:
            file.write(f"--- {time.strftime('%F %T')} {self._doing.phase}, step {self._doing.step}: deadline missed\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    # --- ends --------------------------------------------------------------------------------------------------------

    def _leave(self, reason: str) -> NoReturn:
        """Told to stop from outside: the controller has the word."""
        self._beat(Phase.STOP, reason)
        if self._controller is not None:
            self._controller.tell(reason)
            self._controller.wait(2 * LAST_WORDS)
        self._exit(1)

    def _controller_ended(self, controller: ControllerProcess) -> NoReturn:
        status = controller.wait(LAST_WORDS)
        if status >= 0:
            self._exit(status or 1)  # it said why
        self._exit(1, f"the controller (pid {controller.pid}) was killed by {signal.Signals(-status).name}")

    def _exit(self, status: int, line: str = "") -> NoReturn:
        if self._dealer is not None:
            self._dealer.close()  # a last beat still leaves
        if line:
            doing = self._doing
            place = doing.phase if doing.phase is Phase.START else f"{doing.phase}, step {doing.step}"
            print(f"miles-spmd: rank {self._rank} ({socket.gethostname()}), {place}: {line}", file=self._terminal)
        self._terminal.flush()
        sys.stdout.flush()
        os._exit(status)


def where(thread: int) -> str:
    """Where that thread is: the innermost frame, and the innermost one of this package if that is another."""
    frame = sys._current_frames().get(thread)
    places: list[str] = []
    while frame is not None:
        code = frame.f_code
        ours = code.co_filename.startswith(PACKAGE)
        if ours or not places:
            places.append(f"{code.co_name} ({os.path.basename(code.co_filename)}:{frame.f_lineno})")
        if ours:
            break
        frame = frame.f_back
    return " in ".join(places)
