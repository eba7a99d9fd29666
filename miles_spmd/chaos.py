"""`miles-spmd chaos`: a run into which faults are injected, which is continued whenever it has ended, and a table of
what each fault did to it.

The run is one of its own beside the training run of the same recipe. Its controller strikes
(:mod:`miles_spmd.controller.journal.faults`); this process starts it, watches it from outside, and judges it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil

from miles_spmd import launcher
from miles_spmd.config import Config
from miles_spmd.config.load import ConfigError, load_config
from miles_spmd.controller.attempts import Attempt, Attempts
from miles_spmd.controller.run_folder import LOCK_FILE, RunFolderError, hold, override
from miles_spmd.faults.fault import Fault, read_faults
from miles_spmd.faults.strikes import VARIABLE, Plan, Strike
from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.entries import LedgerError
from miles_spmd.telemetry.json_lines import Lines
from miles_spmd.types.files import naming
from miles_spmd.types.phase import Phase
from miles_spmd.types.printable import printable
from miles_spmd.types.run_files import METRICS_FILE
from miles_spmd.worker.meeting import made_by_launcher

FOLDER = "faults"  # in the folder of the run: the plan, the strikes, and what each start has printed
LOOK_EVERY = 0.05  # seconds
GRACE = 90.0  # seconds beyond the run's own deadlines after which a run that does not end has not survived
LEFT_GRACE = 40.0  # seconds in which the processes of a run end after its launcher
SAID = 300  # characters of a message in the table
LONG = 120.0  # seconds of a deadline that is worth a remark
PHASE_OF = {"save": Phase.CHECKPOINT, "eval": Phase.ROLLOUT}  # the ranks' phase, where it has another name


class ChaosError(RuntimeError):
    """The run did not survive: what happened, and where to look."""


class Program(Protocol):
    """What is used of ``subprocess.Popen``."""

    pid: int

    def poll(self) -> int | None: ...


Start = Callable[[Sequence[str], Mapping[str, str], Path], Program]  # arguments, environment, where it prints


def start_program(arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> Program:
    """Start ``python ARGUMENTS``, in a session of its own, so that what interrupts this process does not reach it."""
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


# --- what happened ----------------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """One start of the run, as it was seen from outside. Times are Unix seconds."""

    number: int
    began: float
    lines: list[tuple[float, str]] = field(default_factory=list)  # when each line was printed
    strikes: list[Strike] = field(default_factory=list)
    ended: float = 0.0  # when no process was left
    status: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the metrics, at its end
    record: Attempt | None = None

    def reports(self, since: float, until: float) -> list[tuple[float, str]]:
        """Return the lines about errors, warnings and requests to stop that were printed meanwhile."""
        return [
            (at, line)
            for at, line in self.lines
            if since <= at < until and re.search(r"^miles-spmd: |: stopping: ", line)
        ]

    def steps(self) -> list[dict[str, Any]]:
        """Return the metrics of the steps that were completed in this launch."""
        if self.record is None or self.record.ready is None:
            return []
        return [
            row for row in self.rows if row["time"] >= self.record.ready and row["step"] > (self.record.first_step or 0)
        ]


@dataclass(frozen=True)
class Row:
    """What one fault did. Seconds are None where there is nothing to measure."""

    fault: Fault
    strike: Strike
    said: str
    detection: float | None  # from the strike to the first report of the run
    exit: float | None  # to the end of the last process
    restart: float | None  # from the next start until a step was completed
    steps: int  # that had to be repeated
    seconds: float  # of work that had to be repeated


class Chaos:
    """The run that ``command`` starts, and its faults. ``show`` receives lines about the progress."""

    def __init__(
        self,
        config: Config,
        faults: Sequence[Fault],
        command: Sequence[str],
        *,
        start: Start = start_program,
        show: Callable[[str], None] = print,
    ) -> None:
        self._config, self._faults, self._command = config, faults, command
        self._start, self._show = start, show
        self._folder = config.run_dir / FOLDER
        self._plan = Plan(self._folder)
        self._output: _Output | None = None
        self._family: dict[int, psutil.Process] = {}  # the processes of the launch, dead or alive
        self._damaged: list[Fault] = []  # checkpoints that no start has come upon yet
        self.launches: list[Launch] = []

    def survive(self) -> None:
        """Start the run until it ends by itself. Raises ChaosError where it does not survive, OSError where nothing can
        be written."""
        for path in self._folder.glob("*"):  # of the rehearsal that run.overwrite replaces
            if path.name != LOCK_FILE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._plan.write(self._faults)
        try:
            while not self.launches or self.launches[-1].status:
                self._launch()
        finally:
            self._kill()
            if self._output is not None:
                self._output.close()
        self._judge()

    def rows(self) -> list[Row]:
        """Return what the faults did that have struck, in that order."""
        return [self._row(launch, strike) for launch in self.launches for strike in launch.strikes]

    # --- one launch --------------------------------------------------------------------------------------------------

    def _launch(self) -> None:
        """Start the run, and wait until none of its processes is left."""
        again = bool(self.launches)
        resume = ["run.overwrite=false", "checkpoint.resume=true"] if again else ["checkpoint.resume=false"]
        launch = Launch(len(self.launches) + 1, time.time())
        output = self._folder / f"start-{launch.number}.log"
        self._show(f"start {launch.number}; its output is in {output}")
        known = len(self._plan.strikes())
        self.launches.append(launch)
        self._family = {}
        lines = self._output = _Output(output)
        environment = os.environ | {VARIABLE: str(self._folder.absolute())}
        program = self._start([*self._command, *resume], environment, lines.pipe)
        self._remember(program.pid)
        while program.poll() is None:
            self._look(launch, lines, known)
            self._remember(program.pid)
            self._limit(launch)
            time.sleep(LOOK_EVERY)
        self._wait_for_the_rest(launch)
        self._look(launch, lines, known)
        lines.close()
        launch.ended, launch.status = time.time(), program.poll() or 0
        launch.rows = Lines(self._config.run_dir / METRICS_FILE, dict[str, Any]).values
        records = Attempts(self._config.run_dir).records
        launch.record = records[-1] if records and records[-1].start >= launch.began else None
        struck = {strike.fault for strike in launch.strikes}
        if launch.status and not any(self._faults[number].kind != "slow" for number in struck):
            raise ChaosError(
                f"start {launch.number} ended without a fault: {_message(launch)}; its output is in {output}"
            )
        self._check_damaged(launch)

    def _look(self, launch: Launch, lines: _Output, known: int) -> None:
        now = time.time()
        launch.lines += [(now, line) for line in lines.read()]
        for strike in self._plan.strikes()[known + len(launch.strikes) :]:
            launch.strikes.append(strike)
            fault, pids = self._faults[strike.fault], ", ".join(map(str, strike.pids))
            self._show(f"{fault} struck {strike.process} (pid {pids}) in {_place(fault)}, {strike.moment}")

    def _remember(self, pid: int) -> None:
        """Take note of the processes that descend from the launcher: they are found no more when it has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            for one in [root, *root.children(recursive=True)]:
                self._family.setdefault(one.pid, one)

    def _remember_marked(self) -> None:
        """Take note of all processes that have the run's variable: a process may have begun when its parent died."""
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if one.environ().get(VARIABLE) == str(self._folder.absolute()):
                    self._family.setdefault(one.pid, one)

    def _alive(self) -> list[psutil.Process]:
        return [one for one in self._family.values() if _lives(one)]

    def _limit(self, launch: Launch) -> None:
        """Raise ChaosError where a fault should have ended the run long ago."""
        for strike in launch.strikes:
            fault = self._faults[strike.fault]
            if fault.ends and time.time() > strike.time + found_by(fault, self._config)[1] + GRACE:
                raise ChaosError(
                    f"{fault}: the run did not end within {time.time() - strike.time:.0f} s of it; what it printed is "
                    f"in {self._folder}, and its logs are in {self._config.run_dir / 'logs'}"
                )

    def _wait_for_the_rest(self, launch: Launch) -> None:
        self._remember_marked()
        end = time.monotonic() + LEFT_GRACE
        while (left := self._alive()) and time.monotonic() < end:
            time.sleep(LOOK_EVERY)
        if left:
            names = "; ".join(f"pid {one.pid}: {_command(one)}" for one in left)
            raise ChaosError(f"start {launch.number} left processes behind, which were killed: {names}")

    def _kill(self) -> None:
        """End what is left of the run: after an error, and when this process is interrupted."""
        for one in self._alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()

    # --- judgement ---------------------------------------------------------------------------------------------------

    def _check_damaged(self, launch: Launch) -> None:
        """Raise ChaosError where a launch has loaded a checkpoint and not named those that were damaged before."""
        if launch.record is not None and launch.record.ready is not None:
            for fault in self._damaged:
                if not _naming([launch], fault):
                    first = launch.record.first_step
                    raise ChaosError(
                        f"{fault}: start {launch.number} continued from step {first} without a word about the damage"
                    )
            self._damaged = []
        struck = [self._faults[strike.fault] for strike in launch.strikes]
        self._damaged += [fault for fault in struck if fault.kind == "corrupt"]

    def _judge(self) -> None:
        """Raise ChaosError with everything that is missing at the end of the run."""
        steps, problems = self._config.run.num_rollout, list[str]()
        struck = {strike.fault for launch in self.launches for strike in launch.strikes}
        if missing := [str(fault) for number, fault in enumerate(self._faults) if number not in struck]:
            problems.append(f"{', '.join(missing)} did not strike: the run did not come to that phase")
        done = {row["step"] for row in self.launches[-1].rows}
        if absent := sorted(set(range(steps + 1)) - done):
            problems.append(f"{METRICS_FILE} has no line of step {', '.join(map(str, absent))}")
        if self._config.determinism.ledger:
            try:
                if absent := sorted(set(range(steps)) - set(verify(self._config.run_dir).steps)):
                    problems.append(f"the ledger has no step {', '.join(map(str, absent))}")
            except LedgerError as error:
                problems.append(str(error))
        if problems:
            raise ChaosError(f"{self._config.run_dir}: {'; '.join(problems)}")

    def _row(self, launch: Launch, strike: Strike) -> Row:
        fault = self._faults[strike.fault]
        later = [one.time for one in launch.strikes if one.time > strike.time]
        reports = launch.reports(strike.time, min(later, default=float("inf")))
        ended = bool(launch.status) and not later
        following = self.launches[launch.number :] if ended else []
        if fault.kind == "corrupt" and following:
            reports = _naming(following, fault)
        steps, seconds = _loss(launch, strike, following)
        said = _said(reports, fault) or _measured(launch, fault)
        return Row(
            fault=fault,
            strike=strike,
            said=said.replace(f"{self._config.run_dir}/", "") or ("nothing" if ended else "nothing; the run went on"),
            detection=reports[0][0] - strike.time if reports else launch.ended - strike.time if ended else None,
            exit=launch.ended - strike.time if ended else None,
            restart=_restart(following[0]) if following else None,
            steps=steps,
            seconds=seconds,
        )


class _Output:
    """What a launch prints, through a named pipe, and into ``file`` from there: a fault by which processes can write no
    file must not keep them from printing."""

    def __init__(self, file: Path) -> None:
        self._folder = contextlib.ExitStack()
        self.pipe = self._folder.enter_context(made_by_launcher()) / "output"
        os.mkfifo(self.pipe)
        self._reader = os.open(self.pipe, os.O_RDONLY | os.O_NONBLOCK)
        self._path, self._file, self._rest = file, file.open("wb", buffering=0), b""

    def read(self) -> list[str]:
        """Return the whole lines since the last call."""
        with naming(self._path), contextlib.suppress(BlockingIOError):  # nothing new
            while content := os.read(self._reader, 1 << 16):
                self._file.write(content)
                self._rest += content
        *lines, self._rest = self._rest.split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def close(self) -> None:
        if not self._file.closed:
            os.close(self._reader)
            self._file.close()
            self._folder.close()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> str:
    try:
        return printable(" ".join(process.cmdline()), 100)
    except psutil.Error:
        return "ended meanwhile"


def found_by(fault: Fault, config: Config) -> tuple[str, float]:
    """Return the deadline by which a run finds at the latest that the fault has struck, and its seconds."""
    name = "heartbeat_timeout"
    if fault.kind == "lost" or fault.phase == "start":
        name = (PHASE_OF.get(fault.phase) or Phase(fault.phase)).deadline
    elif fault.kind == "term":
        name = "checkpoint_timeout"
    return name, getattr(config.deadlines, name)


def _place(fault: Fault) -> str:
    return fault.phase if fault.phase == "start" else f"{fault.phase}, step {fault.step}"


def _message(launch: Launch) -> str:
    """Return the message with which a launch ended, or its last line."""
    lines = [line for _, line in launch.lines]
    return next((line for line in reversed(lines) if line.startswith("miles-spmd: ")), (lines or ["no output"])[-1])


def _said(reports: Sequence[tuple[float, str]], fault: Fault) -> str:
    """Return the report that explains most: where the fault ends the run the message of the end, else the first
    warning, else a request to stop."""
    lines = [line for _, line in reports]
    warnings = [line for line in lines if line.startswith("miles-spmd: warning: ")]
    ends = [line for line in lines if line.startswith("miles-spmd: ") and line not in warnings]
    first = ends + warnings if fault.ends else warnings + ends
    return (first or lines or [""])[0].removeprefix("miles-spmd: ")


def _naming(launches: Sequence[Launch], fault: Fault) -> list[tuple[float, str]]:
    """Return what launches have reported about the checkpoint that ``fault`` has damaged."""
    lines = [line for launch in launches for line in launch.lines]
    return [(at, line) for at, line in lines if "continuing from" in line and f"step_{fault.step:06d}" in line]


def _measured(launch: Launch, fault: Fault) -> str:
    """Return how slow the slowest rank was, where that is what the fault did."""
    name = f"perf/{fault.phase}_slowest"
    values = [row[name] for row in launch.rows if row["step"] == fault.step + 1 and name in row]
    return f"{name} {values[-1]:.1f} in the metrics of that step" if fault.kind == "slow" and values else ""


def _restart(launch: Launch) -> float | None:
    """Return the seconds from a start until its first step was completed; None where a fault ended it before."""
    steps = launch.steps()
    return steps[0]["time"] - launch.began if steps else None


def _loss(launch: Launch, strike: Strike, following: Sequence[Launch]) -> tuple[int, float]:
    """Return how many steps were completed and had to be repeated, and how many seconds of work before the strike."""
    record = launch.record
    ready = [one.record for one in following if one.record is not None and one.record.ready is not None]
    if record is None or record.ready is None or not ready:
        return 0, 0.0
    first, rows = ready[0].first_step or 0, launch.steps()
    last = max((row["step"] for row in rows), default=record.first_step or 0)
    if record.state == "stopped" and first >= last:
        return 0, 0.0  # all was saved
    since = next((row["time"] for row in rows if row["step"] == first), record.ready)
    return max(0, last - first), max(0.0, strike.time - since)


# --- as a verb --------------------------------------------------------------------------------------------------------


def render(rows: Sequence[Row]) -> str:
    """Return the table: a row for each fault."""
    table: list[tuple[str, ...]] = [
        ("injected", "struck", "detection", "exit", "restart", "repeated", "the run reported")
    ]
    for row in rows:
        struck = f"{row.strike.process} (pid {', '.join(map(str, row.strike.pids))})"
        steps = f"{row.steps} step{'s' * (row.steps != 1)}"
        repeated = f"{steps}, {row.seconds:.1f} s" if row.exit is not None else "-"
        seconds = ("-" if value is None else f"{value:.1f} s" for value in (row.detection, row.exit, row.restart))
        table.append((str(row.fault), struck, *seconds, repeated, printable(row.said, SAID)))
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table)


def load(recipe: Path, overrides: list[str], text: str, world_size: int) -> tuple[Config, list[Fault]]:
    """Return the configuration of the run and its faults. Raises ConfigError with the errors of both."""
    from miles_spmd.controller.inputs import errors

    faults: list[Fault] = []

    def inputs(config: Config, without: Collection[str]) -> list[str]:
        found, problems = read_faults(text, config, world_size, without)
        faults.extend(found)
        return errors(config, without, task="train") + problems

    return load_config(recipe, [*overrides, *OWN], world_size=world_size, inputs=inputs), faults


# A run that is not to end in another one's export, nor to begin with its steps.
OWN = ("checkpoint.export_dir=none", "checkpoint.load=none", "checkpoint.resume=false")


def remarks(config: Config, faults: Sequence[Fault]) -> list[str]:
    """Return what a user should know before a long wait, or a great loss."""
    found = []
    for fault in faults:
        name, seconds = found_by(fault, config)
        if fault.kind in ("lost", "stop") and seconds > LONG:
            found.append(f"{fault} is found after deadlines.{name} = {seconds:g} s; a lower value makes this shorter")
    if not config.saves:
        found.append("checkpoint.save_interval = 0: each fault that ends the run costs all of its steps")
    return found


def run(recipe: Path, overrides: list[str], text: str, nproc: int | None) -> int:
    """Do what the verb does, and return its exit status. Prints errors and exits where there are some before."""
    is_rank, world_size = launcher.ranks(nproc)
    if is_rank:
        launcher.fail("chaos starts its ranks itself: call it without torchrun or srun, on one node", code=2)
    with launcher.failing(ConfigError, code=2):
        config, faults = load(recipe, overrides, text, world_size)
    config, _ = launcher.begin(config, "chaos", recipe, rank=None)
    name = override("run.name", config.run.name)
    command = [
        "-m",
        "miles_spmd",
        "train",
        str(recipe),
        *overrides,
        name,
        *OWN[:2],
        "--nproc-per-node",
        str(world_size),
    ]
    show = partial(print, flush=True)
    with launcher.failing(RunFolderError, OSError, code=2):
        lock = hold(config.run_dir / FOLDER)  # between two starts the run itself has none
    for remark in remarks(config, faults):
        launcher.warn(remark)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks for
            signal.signal(number, signal.default_int_handler)
    chaos, problem = Chaos(config, faults, command, show=lambda line: show(f"chaos: {line}")), ""
    try:
        with lock or contextlib.nullcontext():
            chaos.survive()
    except (ChaosError, OSError) as error:
        problem = str(error)
    except KeyboardInterrupt:
        problem = "interrupted; the processes of the run were killed"
    rows = chaos.rows()
    if rows:
        show(render(rows))
    if problem:
        launcher.fail(problem)
    show(f"chaos: {len(rows)} faults struck, and {config.run_dir} finished with all its {config.run.num_rollout} steps")
    return 0
