"""The observer that injects the faults of `miles-spmd chaos`: the controller sees every phase begin and end, and is on
the machine of all processes of such a run, so it strikes for all of them.

A signal is sent inside of its phase: at a share of the shortest time that the phase took before, which differs from
fault to fault, and at the latest at the phase's end. A save lasts until it is complete, beside the training.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from miles_spmd.config import Config
from miles_spmd.controller.attempts import LOGS, AttemptWriter
from miles_spmd.controller.checkpoint_folders import step_folder
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.journal import events
from miles_spmd.faults.fault import PHASES, START, Fault
from miles_spmd.faults.harm import SIGNALS, FullDisk, Slowness, flip_bit, send
from miles_spmd.faults.strikes import Plan, Strike
from miles_spmd.protocol.commands import FinishSave
from miles_spmd.protocol.pipe import LAUNCHER
from miles_spmd.telemetry.json_lines import Lines
from miles_spmd.types.run_files import METRICS_FILE

UNKNOWN = 0.1  # seconds of a phase that was not measured yet
TURN = 0.618034  # multiples of it, modulo 1, are spread evenly: the shares of the phases at which faults strike
LOOK_EVERY = 0.02  # seconds between looks for a process that has not begun


def injected(config: Config, cluster: Cluster, attempt: AttemptWriter) -> list[FaultInjector]:
    """Return the observer that injects faults into this run; none where `miles-spmd chaos` has not started it."""
    plan = Plan.of_environment()
    return [] if plan is None else [FaultInjector(plan, config.run_dir, cluster, attempt.folder)]


class FaultInjector:
    """Observes a run, and strikes it as ``plan`` describes. ``logs``: those of the attempt."""

    def __init__(self, plan: Plan, run_dir: Path, cluster: Cluster, logs: Path) -> None:
        self._plan, self._run_dir, self._cluster, self._logs = plan, run_dir, cluster, logs
        self._faults, self._struck = plan.faults(), {strike.fault for strike in plan.strikes()}
        self._seconds = _shortest(run_dir)
        self._ends: dict[int, Callable[[], object]] = {}  # by the number of a fault whose phase has begun
        self._full: list[FullDisk] = []  # until the step's end
        self._full_save: tuple[int, FullDisk] | None = None  # until the ranks have tried to write the save of this step
        self._lock = threading.Lock()
        self._ending = False  # the run is about to end by a fault that has struck

    def observe(self, event: events.Event) -> None:
        match event:
            case events.PhaseStarted(phase, step):
                self._begin(phase, step)
            case events.PhaseFinished(phase, seconds):
                if phase != "save":
                    self._took(phase, seconds)
                    self._end(phase)
                elif self._full_save is not None:
                    self._await_failure(*self._full_save)
            case events.CheckpointCompleted(step, seconds):
                self._took("save", seconds)
                self._corrupt(step)
                self._end("save", step)
            case events.CheckpointFailed(step):
                self._end("save", step)
            case events.MetricsReported():
                while self._full:
                    self._full.pop().end()

    # --- when --------------------------------------------------------------------------------------------------------

    def _took(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = min(seconds, self._seconds.get(phase, seconds))

    def _begin(self, phase: str, step: int) -> None:
        if self._ending:
            return
        for number, fault in enumerate(self._faults):
            here = fault.phase == phase and (fault.step == step or phase == START)
            turn = phase != START or self._struck.issuperset(range(number))
            if here and turn and number not in self._struck and number not in self._ends:
                self._ends[number] = self._arm(number, fault)
                return

    def _end(self, phase: str, step: int | None = None) -> None:
        for number, end in list(self._ends.items()):
            fault = self._faults[number]
            if fault.phase == phase and step in (None, fault.step):
                del self._ends[number]
                end()

    def _arm(self, number: int, fault: Fault) -> Callable[[], object]:
        """Begin what the fault does in its phase, and return what to do at the phase's end."""
        match fault.kind:
            case "slow":
                pid = self._cluster.pids[fault.rank]
                self._note(number, fault.process, [pid], "from its beginning")
                return Slowness(pid).end
            case "lost":
                lost = partial(self._note, number, fault.process, [self._cluster.pids[fault.rank]], "at its command")
                self._cluster.lose(fault.rank, lost)
                return partial(self._cluster.lose, None)
            case "diskfull":
                return self._fill_disk(number, fault)
            case "corrupt":
                return lambda: None
        threading.Thread(target=self._wait, args=(number, fault, time.monotonic()), daemon=True).start()
        return lambda: self._signal(number, fault, "at its end")

    def _wait(self, number: int, fault: Fault, began: float) -> None:
        """Strike when it is time, and there is such a process."""
        time.sleep((0.5 + TURN * number) % 1 * self._seconds.get(fault.phase, UNKNOWN))
        while not self._signal(number, fault, f"{time.monotonic() - began:.2f} s after its beginning"):
            time.sleep(LOOK_EVERY)

    # --- what --------------------------------------------------------------------------------------------------------

    def _note(self, number: int, process: str, pids: Sequence[int], moment: str) -> None:
        self._struck.add(number)
        fault = self._faults[number]
        self._ending = self._ending or (
            fault.ends and fault.kind != "term"
        )  # a run that is to stop goes on for a while
        self._plan.strike(Strike(number, process, [*pids], time.time(), moment))

    def _signal(self, number: int, fault: Fault, moment: str) -> bool:
        """Send the signal, once. Returns False where that process has not begun."""
        with self._lock:
            if number not in self._struck:
                if (pid := self._pid(fault.process)) is None:
                    return False
                self._note(number, fault.process, [pid], moment)
                send(pid, SIGNALS[fault.kind])
            return True

    def _fill_disk(self, number: int, fault: Fault) -> Callable[[], None]:
        """The ranks write a checkpoint, and the controller everything else. For ranks in a save the disk is full until
        they have tried to write, otherwise until the step's end, at which the controller writes its metrics."""
        saves = fault.phase == "save"
        ranks = [f"rank{info.rank}" for info in self._cluster.infos]
        processes = [fault.process] if fault.process else ranks if saves else ["controller"]
        pids = [pid for process in processes if (pid := self._pid(process)) is not None]
        name = "all ranks" if len(processes) > 1 else processes[0]
        self._note(number, name, pids, "from its beginning")
        full = FullDisk(pids)
        if saves and fault.process != "controller":
            self._full_save = fault.step, full
        else:
            self._full.append(full)
        return lambda: None

    def _await_failure(self, step: int, full: FullDisk) -> None:
        """The disk has room again when all ranks have tried to write their files, which they do beside the training."""
        self._full_save = None
        self._cluster.call(FinishSave(wait=True), step=step)
        full.end()

    def _corrupt(self, step: int) -> None:
        """Damage the checkpoint of ``step``, which is complete, and end the run."""
        for number in self._ends:
            fault = self._faults[number]
            if fault.kind == "corrupt" and fault.step == step:
                file = flip_bit(step_folder(self._run_dir, step))
                self._note(number, "controller", [os.getpid()], f"a bit of {file.relative_to(self._run_dir)} flipped")
                send(os.getpid(), SIGNALS["kill"])

    # --- whom --------------------------------------------------------------------------------------------------------

    def _pid(self, process: str) -> int | None:
        """Return the process of that name; None where it has not begun."""
        match process:
            case "controller":
                return os.getpid()
            case "launcher":
                return int(os.environ[LAUNCHER])
            case "reward":
                children = [
                    one for one in psutil.Process().children() if "miles_spmd.rewards" in " ".join(one.cmdline())
                ]
                return children[0].pid if children else None
        rank = int(process.removeprefix("rank"))
        return self._cluster.pids.get(rank) or self._starting(rank)

    def _starting(self, rank: int) -> int | None:
        """Return the process of a rank that has not connected, from the first line of its log."""
        for log in (self._run_dir / LOGS / f"rank-{rank}.starting.log", self._logs / f"rank-{rank}.log"):
            found = re.findall(r"^--- .* pid (\d+)$", log.read_text() if log.exists() else "", re.MULTILINE)
            for pid in map(int, found[-1:]):  # a start that was killed may have left its log
                with suppress(psutil.Error):
                    if int(os.environ[LAUNCHER]) in [one.pid for one in psutil.Process(pid).parents()]:
                        return pid
        return None


def _shortest(run_dir: Path) -> dict[str, float]:
    """Return the shortest time of each phase, in seconds, in the steps that the run has reported before."""
    seconds: dict[str, float] = {}
    for row in Lines(run_dir / METRICS_FILE, dict[str, Any]).values:
        for phase in PHASES:
            name = f"perf/{'save_write' if phase == 'save' else phase}_time"
            if name in row:
                seconds[phase] = min(row[name], seconds.get(phase, row[name]))
    return seconds
