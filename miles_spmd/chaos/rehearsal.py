"""The run that has to survive its faults: started, continued whenever it has ended, and judged at its end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from miles_spmd import launcher
from miles_spmd.chaos.launches import LOOK_EVERY, Launch, Line, Output, Processes, Start, start_program
from miles_spmd.chaos.table import Row, render, rows
from miles_spmd.config import Config
from miles_spmd.config.load import ConfigError, load_config
from miles_spmd.controller.run_folder import LOCK_FILE, RunFolderError, hold, override
from miles_spmd.faults.fault import START, Fault, read_faults
from miles_spmd.faults.strikes import VARIABLE, Plan
from miles_spmd.ledger.chain import verify
from miles_spmd.ledger.entries import LedgerError
from miles_spmd.types.phase import Phase
from miles_spmd.types.run_files import METRICS_FILE

FOLDER = "faults"  # in the folder of the run: the plan, the strikes, and what each start has printed
GRACE = 90.0  # seconds beyond the run's own deadlines after which a run that does not end has not survived
LEFT_GRACE = 40.0  # seconds in which the processes of a run end after its launcher
LONG = 120.0  # seconds of a deadline that is worth a remark
PHASE_OF = {"save": Phase.CHECKPOINT, "eval": Phase.ROLLOUT}  # the ranks' phase, where it has another name
# A run that is not to end in another one's export, nor to begin with its steps.
OWN = ("checkpoint.export_dir=none", "checkpoint.load=none", "checkpoint.resume=false")


class ChaosError(RuntimeError):
    """The run did not survive: what happened, and where to look."""


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
        self._damaged: list[Fault] = []  # checkpoints that no start has come upon yet
        self.launches: list[Launch] = []

    def survive(self) -> None:
        """Start the run until it ends by itself. Raises ChaosError where it does not survive, OSError where nothing can
        be written."""
        for path in self._folder.glob("*"):  # of the rehearsal that run.overwrite replaces
            if path.name != LOCK_FILE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._plan.write(self._faults)
        while not self.launches or self.launches[-1].status:
            self._launch()
        self._judge()

    def rows(self) -> list[Row]:
        """Return what the faults did that have struck, in that order."""
        return rows(self.launches, self._faults, self._config.run_dir)

    # --- one launch --------------------------------------------------------------------------------------------------

    def _launch(self) -> None:
        """Start the run, and wait until none of its processes is left."""
        again = bool(self.launches)
        resume = ["run.overwrite=false", "checkpoint.resume=true"] if again else ["checkpoint.resume=false"]
        launch = Launch(len(self.launches) + 1, time.time())
        self.launches.append(launch)
        file, mark = self._folder / f"start-{launch.number}.log", str(self._folder.absolute())
        self._show(f"start {launch.number}; its output is in {file}")
        with Output(file) as output:
            program = self._start([*self._command, *resume], os.environ | {VARIABLE: mark}, output.pipe)
            with Processes(program.pid, mark) as processes:
                while (status := program.poll()) is None:
                    self._look(launch, output)
                    processes.look()
                    self._limit(launch)
                    time.sleep(LOOK_EVERY)
                if left := processes.wait(LEFT_GRACE):
                    names = "; ".join(left)
                    raise ChaosError(f"start {launch.number} left processes behind, which were killed: {names}")
            self._look(launch, output)
        launch.end(status, self._config.run_dir)
        struck = [self._faults[strike.fault] for strike in launch.strikes]
        if launch.status and not any(fault.kind != "slow" for fault in struck):
            raise ChaosError(f"start {launch.number} ended without a fault: {launch.message}; its output is in {file}")
        self._check_damaged(launch)
        self._damaged += [fault for fault in struck if fault.kind == "corrupt"]

    def _look(self, launch: Launch, output: Output) -> None:
        """Take what was printed, and the faults that have struck."""
        now = time.time()
        launch.lines += [Line(now, text) for text in output.read()]
        known = sum(len(one.strikes) for one in self.launches)
        for strike in self._plan.strikes()[known:]:
            launch.strikes.append(strike)
            fault, pids = self._faults[strike.fault], ", ".join(map(str, strike.pids))
            place = fault.phase if fault.phase == START else f"{fault.phase}, step {fault.step}"
            self._show(f"{fault} struck {strike.process} (pid {pids}) in {place}, {strike.moment}")

    def _limit(self, launch: Launch) -> None:
        """Raise ChaosError where a fault should have ended the run long ago."""
        for strike in launch.strikes:
            fault = self._faults[strike.fault]
            if fault.ends and time.time() > strike.time + found_by(fault, self._config)[1] + GRACE:
                raise ChaosError(
                    f"{fault}: the run did not end within {time.time() - strike.time:.0f} s of it; what it printed is "
                    f"in {self._folder}, and its logs are in {self._config.run_dir / 'logs'}"
                )

    # --- judgement ---------------------------------------------------------------------------------------------------

    def _check_damaged(self, launch: Launch) -> None:
        """Raise ChaosError where a launch has loaded a checkpoint and not named those that were damaged before."""
        if launch.ready is None:
            return
        for fault in self._damaged:
            if not launch.damage(fault.step):
                raise ChaosError(
                    f"{fault}: start {launch.number} continued from step {launch.first_step} without a word about the "
                    "damage"
                )
        self._damaged = []

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


def found_by(fault: Fault, config: Config) -> tuple[str, float]:
    """Return the deadline by which a run finds at the latest that the fault has struck, and its seconds."""
    name = "heartbeat_timeout"
    if fault.kind == "lost" or fault.phase == START:
        name = (PHASE_OF.get(fault.phase) or Phase(fault.phase)).deadline
    elif fault.kind == "term":
        name = "checkpoint_timeout"
    return name, getattr(config.deadlines, name)


# --- as a verb --------------------------------------------------------------------------------------------------------


def run(recipe: Path, overrides: list[str], text: str, nproc: int | None) -> int:
    """Do what the verb does, and return its exit status. Prints errors and exits where there are some before."""
    is_rank, world_size = launcher.ranks(nproc)
    if is_rank:
        launcher.fail("chaos starts its ranks itself: call it without torchrun or srun, on one node", code=2)
    with launcher.failing(ConfigError, code=2):
        config, faults = load(recipe, overrides, text, world_size)
    config, _ = launcher.begin(config, "chaos", recipe, rank=None)
    own = override("run.name", config.run.name), *OWN[:2], f"--nproc-per-node={world_size}"
    command = ["-m", "miles_spmd", "train", str(recipe), *overrides, *own]
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
    table = chaos.rows()
    if table:
        show(render(table))
    if problem:
        launcher.fail(problem)
    show(
        f"chaos: {len(table)} faults struck, and {config.run_dir} finished with all its {config.run.num_rollout} steps"
    )
    return 0


def load(recipe: Path, overrides: list[str], text: str, world_size: int) -> tuple[Config, list[Fault]]:
    """Return the configuration of the run and its faults. Raises ConfigError with the errors of both."""
    from miles_spmd.controller.inputs import errors

    faults: list[Fault] = []

    def inputs(config: Config, without: Collection[str]) -> list[str]:
        found, problems = read_faults(text, config, world_size, without)
        faults.extend(found)
        if config.resilience.cells > 1:
            cells = (
                "must be 1: chaos continues a run that a fault has ended, and cells go on without the one it strikes"
            )
            problems = [f"resilience.cells: {cells}"]
        return errors(config, without, task="train") + problems

    return load_config(recipe, [*overrides, *OWN], world_size=world_size, inputs=inputs), faults


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
