"""The supervisor of a run whose ranks are divided into cells: what starts the controller, the lighthouse through which
cells find each other, and a launcher for the ranks of each cell; and a cell again when the controller has lost it.

It is the process that the user has started, and has nothing to do with what is computed. It outlives every cell.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import msgspec
import psutil

from miles_spmd.config import Config
from miles_spmd.protocol import last_words
from miles_spmd.protocol.pipe import CellEnded, Credentials, End, StartCell
from miles_spmd.protocol.router import LOOPBACK
from miles_spmd.telemetry.environment import gpus
from miles_spmd.types.cell import KEYS, Cell
from miles_spmd.worker.controller_process import ControllerProcess
from miles_spmd.worker.meeting import made_by_launcher

POLL = 0.1  # seconds between looks at the launchers
LEAVING = 20.0  # seconds that ranks may take to end after the controller has
DEAD_MILLISECONDS = 2000  # after which the lighthouse does not count with a cell whose heartbeats have stopped
JOIN_MILLISECONDS = 3000  # in which it waits for a cell that is alive and has not asked yet


@dataclass
class _Launched:
    """One start of a cell, by the number that it has among those of this cell."""

    start: int
    keys: Path
    process: subprocess.Popen[bytes]


class Supervisor:
    """Runs ``task`` with ``ranks`` ranks in each of the configuration's cells."""

    def __init__(self, config: Config, task: str, ranks: int) -> None:
        self._config, self._task, self._ranks = config, task, ranks
        self._launched: dict[int, _Launched] = {}
        self._due: list[tuple[float, StartCell]] = []  # when (monotonic) which cell is to be started
        self._orders: queue.Queue[StartCell] = queue.Queue()

    def run(self) -> int:
        """Return the status with which the run has ended."""
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(made_by_launcher())
            unsaid = self._folder / "unsaid"
            unsaid.touch()
            os.environ[last_words.VARIABLE] = str(unsaid)
            cells = self._config.resilience.cells
            self._controller = ControllerProcess(self._config, self._task, LOOPBACK, cells * self._ranks)
            self._take_signals()
            stack.callback(self._end_cells)
            self._lighthouse = stack.enter_context(_lighthouse())
            try:
                credentials = self._controller.credentials()
            except EOFError:
                return self._end()
            for cell in range(cells):
                own = credentials[cell * self._ranks : (cell + 1) * self._ranks]
                self._start(StartCell(cell, 0, 0.0, own))
            self._listening = threading.Thread(target=self._take_orders, daemon=True)
            self._listening.start()
            stack.callback(self._obey_last_orders)
            while self._controller.alive:
                self._step()
            return self._end()

    # --- while the run goes on ---------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Do what is due, and wait for what comes."""
        with contextlib.suppress(queue.Empty):
            order = self._orders.get(timeout=POLL)
            self._kill(order.cell)
            if order.credentials:
                self._due.append((time.monotonic() + order.after, order))
        now = time.monotonic()
        for at, order in [*self._due]:
            if now >= at:
                self._due.remove((at, order))
                self._start(order)
        for cell, launched in [*self._launched.items()]:
            if (status := launched.process.poll()) is not None:
                del self._launched[cell]
                how = f"its launcher was killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
                with contextlib.suppress(OSError):  # the controller has ended meanwhile
                    self._controller.send(CellEnded(cell, launched.start, how))
                _kill_started(launched.keys)  # a rank that is stopped does not notice that its launcher was killed

    def _take_orders(self) -> None:
        for order in self._controller.orders():
            self._orders.put(order)

    def _take_signals(self) -> None:
        """Pass requests to stop on to the controller, and end the run at once by other signals."""

        def ask(number: int, frame: FrameType | None) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._controller.pid, number)

        def end(number: int, frame: FrameType | None) -> None:
            with contextlib.suppress(OSError):
                self._controller.send(End(f"stopped by {signal.Signals(number).name}"))

        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, ask)
        for number in (signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, end)

    # --- cells -------------------------------------------------------------------------------------------------------

    def _start(self, order: StartCell) -> None:
        keys = self._folder / f"keys-{order.cell}-{order.start}.json"
        _write_private(keys, order.credentials)
        cell = Cell(order.cell, self._config.resilience.cells, self._lighthouse, str(keys))
        command = [sys.executable, "-m", "miles_spmd", *sys.argv[1:], f"--nproc-per-node={self._ranks}"]
        process = launch(command, os.environ | cell.environment | self._devices(order.cell))
        self._launched[order.cell] = _Launched(order.start, keys, process)

    def _devices(self, cell: int) -> dict[str, str]:
        """Return the variable that gives ``cell`` its share of the GPUs of this machine; all of them where there are
        not enough for every rank of all cells."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        own = visible.split(",") if visible else [str(number) for number in range(len(gpus()))]
        if len(own) < self._config.resilience.cells * self._ranks:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(own[cell * self._ranks : (cell + 1) * self._ranks])}

    def _kill(self, cell: int) -> None:
        """Kill everything that the last start of ``cell`` has left."""
        launched = self._launched.pop(cell, None)
        if launched is not None:
            launched.process.kill()
            _kill_started(launched.keys)
            launched.process.wait()

    # --- the end -----------------------------------------------------------------------------------------------------

    def _end(self) -> int:
        status = self._controller.wait()
        if killed := self._controller.killed(status):
            last_words.say(killed)
        return status if status >= 0 else 1

    def _obey_last_orders(self) -> None:
        """Kill cells that the run has ended without: one that is being started has no connection to the controller
        yet, whose end would end it."""
        self._listening.join(LEAVING)
        while not self._orders.empty():
            self._kill(self._orders.get().cell)

    def _end_cells(self) -> None:
        """Let ranks end by themselves, which have lost the controller, and kill those that do not."""
        end = time.monotonic() + LEAVING
        for cell, launched in [*self._launched.items()]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                launched.process.wait(max(0.0, end - time.monotonic()))
            self._kill(cell)


def launch(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a launcher. Signals of the terminal are for this process."""
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)


@contextlib.contextmanager
def _lighthouse() -> Iterator[str]:
    """Run the lighthouse of torchft in this process; provide its address."""
    os.environ.setdefault("RUST_LOG", "error")  # it would report every meeting on the terminal
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind=f"{LOOPBACK}:0",
        min_replicas=1,
        join_timeout_ms=JOIN_MILLISECONDS,
        quorum_tick_ms=20,
        heartbeat_timeout_ms=DEAD_MILLISECONDS,
    )
    try:
        yield f"http://{LOOPBACK}:{server.address().rsplit(':', 1)[1]}"
    finally:
        server.shutdown()


def _write_private(path: Path, credentials: Sequence[Credentials]) -> None:
    """Write a file that only this user can read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(msgspec.json.encode(credentials))


def _kill_started(keys: Path) -> None:
    """Kill the processes of a cell that was started with this file of keys, however they have become orphans."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(KEYS) == str(keys):
                process.kill()
