"""The supervisor of a run whose ranks are divided into cells: what starts the controller, the lighthouse through which
cells find each other, and a launcher for the ranks of each cell; and a cell again when the controller has lost it.

It is the process that the user has started, and has nothing to do with what is computed. It outlives every cell.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import msgspec
import psutil

from miles_spmd.config import Config
from miles_spmd.config.load import dump_config
from miles_spmd.protocol import last_words
from miles_spmd.protocol.pipe import LAUNCHER, REQUEUE, SUPERVISOR, CellEnded, End, PrepareCell, StartCell, ToSupervisor
from miles_spmd.protocol.router import ANY_INTERFACE, LOOPBACK, address_towards
from miles_spmd.telemetry.environment import gpus
from miles_spmd.types.cell import KEYS, Cell
from miles_spmd.types.variables import text
from miles_spmd.worker.controller_process import ControllerProcess
from miles_spmd.worker.meeting import PREFIX, made_by_launcher, write_private
from miles_spmd.worker.slurm_task import hosts

SLURM = "MILES_SPMD_CELL_STEPS"  # environment: set where cells are to be steps of a job of Slurm
POLL = 0.1  # seconds between looks at the launchers
LEAVING = 20.0  # seconds that ranks may take to end after the controller has
SILENT = 20.0  # seconds after the end of all cells in which a controller that lives has ended, too
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
        self._steps: LocalSteps | SlurmSteps = LocalSteps()
        if SLURM in os.environ:
            self._steps = SlurmSteps(config.resilience.cells)
        self._here = self._steps.cells_of_a_machine or config.resilience.cells
        self._launched: dict[int, _Launched] = {}
        self._standby: dict[int, _Launched] = {}  # for the next start of a cell
        self._take_part: set[int] = set()  # cells
        self._due: list[tuple[float, StartCell]] = []  # when (monotonic) which cell is to be started
        self._orders: queue.Queue[ToSupervisor] = queue.Queue()
        self._ended_by = 0  # the number of the signal that has ended the run at once
        self._alone_since = math.inf  # monotonic: when the last cell had failed, and none was to be started
        self._silent = False  # the controller was

    def run(self) -> int:
        """Return the status with which the run has ended."""
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(made_by_launcher())
            unsaid = folder / "unsaid"
            unsaid.touch()
            os.environ |= {last_words.VARIABLE: str(unsaid), LAUNCHER: str(os.getpid())}
            cells = self._config.resilience.cells
            self._controller = ControllerProcess(self._config, self._task, self._steps.host, cells * self._ranks)
            self._take_signals()
            self._keys = folder
            if isinstance(self._steps, SlurmSteps):  # nodes see no other folder
                scratch = tempfile.TemporaryDirectory(prefix=PREFIX, dir=self._config.run_dir)
                self._keys = Path(stack.enter_context(scratch)).absolute()
            self._recipe = self._keys / "config.toml"  # the user's may be another one when a cell is started again
            write_private(self._recipe, dump_config(self._config).encode())
            stack.callback(self._end_cells)
            self._lighthouse = stack.enter_context(_lighthouse(self._steps.host))
            try:
                credentials = self._controller.credentials()
            except EOFError:
                return self._end()
            for cell in range(cells):
                own = credentials[cell * self._ranks : (cell + 1) * self._ranks]
                self._start(StartCell(cell, 0, 0.0, own))
            threading.Thread(target=self._take_orders, daemon=True).start()
            while self._controller.alive:
                self._step()
            return self._end()

    # --- while the run goes on ---------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Do what is due, and wait for what comes."""
        with contextlib.suppress(queue.Empty):
            self._obey(self._orders.get(timeout=POLL))
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
                # after a regular end the controller may have more to do
                self._alone_since = math.inf if status in (0, REQUEUE) else now
        if not self._launched and not self._due and now > self._alone_since + SILENT:
            self._silent = True
            self._controller.kill()

    def _obey(self, order: ToSupervisor) -> None:
        if isinstance(order, PrepareCell):
            self._take_part.add(order.cell)
            if self._config.resilience.standby:
                self._standby[order.cell] = self._launch(order.cell, order.start)
            return
        self._take_part.discard(order.cell)
        self._kill(self._launched.pop(order.cell, None))
        if order.credentials:
            self._due.append((time.monotonic() + order.after, order))
        else:
            self._kill(self._standby.pop(order.cell, None))

    def _take_orders(self) -> None:
        for order in self._controller.orders():
            self._orders.put(order)

    def _take_signals(self) -> None:
        """Pass requests to stop on to the controller, and end the run at once by other signals."""

        def ask(number: int, frame: FrameType | None) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._controller.pid, number)

        def end(number: int, frame: FrameType | None) -> None:
            self._ended_by = self._ended_by or number
            with contextlib.suppress(OSError):
                self._controller.send(End(f"stopped by {signal.Signals(number).name}"))

        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, ask)
        for number in (signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, end)

    # --- cells -------------------------------------------------------------------------------------------------------

    def _start(self, order: StartCell) -> None:
        standby = self._standby.pop(order.cell, None)
        if standby is not None and (standby.start != order.start or standby.process.poll() is not None):
            self._kill(standby)
            standby = None
        write_private(self._keys_of(order.cell, order.start), msgspec.json.encode(order.credentials))
        self._launched[order.cell] = standby or self._launch(order.cell, order.start)

    def _keys_of(self, cell: int, start: int) -> Path:
        return self._keys / f"keys-{cell}-{start}.json"

    def _launch(self, cell: int, start: int) -> _Launched:
        keys = self._keys_of(cell, start)
        place = Cell(cell, self._config.resilience.cells, self._lighthouse, str(keys), self._here)
        own = place.environment | self._steps.environment() | self._devices(cell)
        if start:  # the run does not end where it fails
            own[last_words.VARIABLE] = ""
        arguments = [self._task, str(self._recipe), f"--nproc-per-node={self._ranks}"]
        process = launch(self._steps.command(cell, keys.stem, arguments), os.environ | own)
        return _Launched(start, keys, process)

    def _devices(self, cell: int) -> dict[str, str]:
        """Return the variable that gives ``cell`` its share of the GPUs of a machine; all of them where there are not
        enough for every rank of all cells."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        own = visible.split(",") if visible else [str(number) for number in range(len(gpus()))]
        if len(own) < self._here * self._ranks:
            return {}
        first = cell % self._here * self._ranks
        return {"CUDA_VISIBLE_DEVICES": ",".join(own[first : first + self._ranks])}

    def _kill(self, launched: _Launched | None) -> None:
        """Kill everything that a start of a cell has left."""
        if launched is not None:
            launched.process.kill()
            self._steps.kill(launched.keys.stem)
            _kill_started(launched.keys)
            launched.process.wait()

    # --- the end -----------------------------------------------------------------------------------------------------

    def _end(self) -> int:
        status = self._controller.wait()
        if self._silent:
            last_words.say(f"the controller (pid {self._controller.pid}) was silent, and was killed")
        elif killed := self._controller.killed(status):
            last_words.say(killed)
        if status and self._ended_by:
            return 128 + self._ended_by
        return status if status >= 0 else 1

    def _end_cells(self) -> None:
        """Let ranks end by themselves, which have lost the controller, and kill those that do not. Those of a cell that
        is being started may have no controller yet that they could lose."""
        for standby in self._standby.values():
            self._kill(standby)
        for cell in self._launched.keys() - self._take_part:
            self._kill(self._launched.pop(cell))
        end = time.monotonic() + LEAVING
        for launched in self._launched.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                launched.process.wait(max(0.0, end - time.monotonic()))
            self._kill(launched)


class LocalSteps:
    """Launchers of cells as processes of this machine, where ``host`` is."""

    host = LOOPBACK
    cells_of_a_machine = 0  # all

    def environment(self) -> dict[str, str]:
        """Return the variables of launchers."""
        return {SUPERVISOR: str(os.getpid())}

    def command(self, cell: int, name: str, arguments: Sequence[str]) -> list[str]:
        """Return the command that starts ``cell``, under a name of its own, with these ``arguments`` of
        miles-spmd."""
        return [sys.executable, "-m", "miles_spmd", *arguments]

    def kill(self, name: str) -> None:
        """Kill what only this object can find of the start of that name."""


class SlurmSteps(LocalSteps):
    """Launchers of ``cells`` cells as steps of the job whose batch script runs this process. Each is on one node, and
    nodes get equally many."""

    def __init__(self, cells: int) -> None:
        self.host = text("MASTER_ADDR")
        self._nodes = hosts(text("SLURM_JOB_NODELIST"))
        self.cells_of_a_machine = max(1, cells // len(self._nodes))

    def environment(self) -> dict[str, str]:
        return {}  # a launcher's parent is Slurm's process on its node

    def command(self, cell: int, name: str, arguments: Sequence[str]) -> list[str]:
        node = self._nodes[cell // self.cells_of_a_machine]
        step = ["srun", f"--job-name={name}", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--overlap", "--no-kill"]
        step += ["--cpu-bind=none", "--mem=0", *(["--gpu-bind=none"] if "SLURM_GPUS_ON_NODE" in os.environ else [])]
        return [*step, *super().command(cell, name, arguments)]

    def kill(self, name: str) -> None:
        shown = _output("squeue", "-h", "--steps", f"--jobs={text('SLURM_JOB_ID')}", "-o", "%i %j")
        for step, own in (line.split(maxsplit=1) for line in shown.splitlines()):
            if own == name:
                _output("scancel", "--signal=KILL", step)


def _output(*command: str) -> str:
    """Return what a command of Slurm prints; "" where it fails, as while its server is away."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def launch(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a launcher. Signals of the terminal are for this process."""
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)


@contextlib.contextmanager
def _lighthouse(host: str) -> Iterator[str]:
    """Run the lighthouse of torchft in this process, on the interface by which cells reach ``host``; provide its
    address."""
    os.environ.setdefault("RUST_LOG", "error")  # it would report every meeting on the terminal
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind=f"{address_towards(host) or ANY_INTERFACE}:0",
        min_replicas=1,
        join_timeout_ms=JOIN_MILLISECONDS,
        quorum_tick_ms=20,
        heartbeat_timeout_ms=DEAD_MILLISECONDS,
    )
    try:
        yield f"http://{host}:{server.address().rsplit(':', 1)[1]}"
    finally:
        server.shutdown()


def _kill_started(keys: Path) -> None:
    """Kill the processes of a cell that was started with this file of keys, however they have become orphans."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(KEYS) == str(keys):
                process.kill()
