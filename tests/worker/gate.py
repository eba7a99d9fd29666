"""Stops a process of a run inside a phase, so that a test can hurt the run at exactly this moment.

The file that ``GATE_FILE`` names says where: STEP PHASE HOLDER CALL. The process HOLDER (controller, rank_0, rank_1 or
reward) stops itself with SIGSTOP at that call of a function in its main thread, or at the end of the phase where there
are fewer calls: the run cannot get past the phase, on whatever machine. A reward process stops when it is called. Who
stops writes GATE_FILE.held before: its process id, and where it is. PHASE "all" stops nobody: each process appends its
number of calls in each phase of that step to GATE_FILE.calls.

An interpreter calls :func:`install` by a ``sitecustomize`` that is in its PYTHONPATH (:func:`write_hook`).
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from miles_spmd.types.sample import Sample
from tests.recipe_run import coin as _coin

PHASE_OF = {"checkpoint": "save"}  # the ranks' name of the phase


class Gate:
    """The gate of this process, which is ``holder``."""

    def __init__(self, holder: str) -> None:
        self._file, self._holder = Path(os.environ["GATE_FILE"]), holder
        self._line, self._phase, self._wanted, self._limit, self._calls = "", "", "", 0, 0
        self._open = False

    def wants(self, holder: str, phase: str, step: int) -> int:
        """The number of the call at which ``holder`` has to stop in this phase; 0 if it has not to."""
        self._line = self._file.read_text()
        at, wanted, who, call = self._line.split()
        self._wanted = wanted
        return int(call) if int(at) == step and (wanted == "all" or (wanted, who) == (phase, holder)) else 0

    def open(self, phase: str, step: int) -> None:
        """The phase begins."""
        self._limit = self.wants(self._holder, phase, step)
        if self._limit:
            self._open, self._phase, self._calls = True, phase, 0
            if phase != "start":  # it has too many
                sys.setprofile(self._count)

    def close(self) -> None:
        """The phase ends."""
        if not self._open:
            return
        sys.setprofile(None)
        if self._wanted == "all":
            self._open = False
            with Path(f"{self._file}.calls").open("a") as file:
                file.write(f"{self._holder} {self._phase} {self._calls}\n")
        else:
            self.hold("the end of the phase")

    def hold(self, place: str) -> None:
        """Report it, and stop until the test lets the process go on; not where the run has been hurt meanwhile."""
        self._open = False
        if self._line and self._file.read_text() != self._line:
            return
        scratch = Path(f"{self._file}.{os.getpid()}")
        scratch.write_text(f"{os.getpid()} {place}")
        scratch.rename(f"{self._file}.held")
        os.kill(os.getpid(), signal.SIGSTOP)

    def _count(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "c_call"):
            return
        self._calls += 1
        if self._calls == self._limit and self._wanted != "all":
            sys.setprofile(None)
            name = argument.__name__ if event == "c_call" else "begin"
            self.hold(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}, {name}")


def install() -> None:
    """Put a gate into this process if it is the controller or a rank."""
    if "GATE_FILE" not in os.environ:
        return
    if "miles_spmd.controller" in sys.orig_argv:
        _in_controller()
    elif "RANK" in os.environ and ("miles_spmd" in sys.orig_argv or "tests.preloaded" in sys.modules):
        _in_rank()


def _in_rank() -> None:
    from miles_spmd.worker.watchdog import Watchdog

    gate, enter = Gate(f"rank_{os.environ['RANK']}"), Watchdog.enter

    def enter_gated(self: Watchdog, phase: str, step: int, *seconds: float) -> None:
        gate.close()
        enter(self, phase, step, *seconds)
        gate.open(PHASE_OF.get(phase, str(phase)), step)

    Watchdog.enter = enter_gated


def _in_controller() -> None:
    """The methods of its phases, all of which have the step as their first argument, are wrapped when they have been
    imported, which they are late."""
    from miles_spmd.controller.cluster.cluster import Cluster

    gate, wait_ready = Gate("controller"), Cluster.wait_ready

    def gated(phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, step: int, *args: Any, **named: Any) -> Any:
            if phase == "rollout" and gate.wants("reward", phase, step) and gate._wanted != "all":
                Path(os.environ["GATE_FILE"] + ".reward").touch()
            gate.open(phase, step)
            try:
                return method(self, step, *args, **named)
            finally:
                gate.close()

        return call

    @functools.cache
    def wrap() -> None:
        from miles_spmd.controller.checkpoints import Checkpoints
        from miles_spmd.controller.generation.generation import Generation
        from miles_spmd.controller.learning.policy import Policy

        Generation.rollout = gated("rollout", Generation.rollout)
        Policy.score = gated("log_probs", Policy.score)
        Policy.train = gated("train", Policy.train)
        Policy.refit_now = gated("refit", Policy.refit_now)
        Checkpoints.save = gated("save", Checkpoints.save)

    def wait_ready_gated(self: Cluster) -> None:
        wrap()
        wait_ready(self)

    Cluster.wait_ready = wait_ready_gated


def coin(sample: Sample) -> float:
    """The reward, whose process stops at the gate when the controller has come to its rollout."""
    try:
        Path(os.environ["GATE_FILE"] + ".reward").unlink()
    except FileNotFoundError:
        return _coin(sample)
    Gate("reward").hold("called")
    return _coin(sample)


def write_hook(folder: Path) -> str:
    """Write into ``folder`` what makes interpreters call :func:`install`; return what their PYTHONPATH begins with."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("from tests.worker import gate\n\ngate.install()\n")
    return str(folder)
