"""Whether a run has been asked to stop, how much time is left, and whether what is under way can be finished in it.

The controller is the only process that decides, so its decision is that of all ranks. Requests come from signals (here,
or at a rank, whose watchdog passes them on), from the file ``stop`` in the run's folder, and from the end of the job.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue

from miles_spmd.controller.cluster.errors import Unfinished
from miles_spmd.controller.journal import events
from miles_spmd.types.variables import job_end

STOP_FILE = "stop"  # in the run's folder
GRACE = {"SIGTERM": 30.0, "SIGUSR1": 300.0}  # seconds from a signal until whoever sent it kills the run
LAST = 10.0  # seconds from a second request to the end
SAME = 2.0  # seconds in which requests count as one: a signal may reach a launcher and each of its ranks
CLOSING = 2.0  # seconds before the end in which a run ends itself, unless it writes a checkpoint: with a message
MARGIN = 5.0  # seconds to stop ranks, write a report and exit
FACTOR = 1.3  # of what was measured, for what is planned
UNMEASURED_SAVE = 30.0  # seconds
MAX_SECONDS = 100  # bytes of the file that are read
LOOK_EVERY = 1.0  # seconds between looks for files
REMEMBERED = 3  # steps: the longest of them counts
NOT_OF_A_STEP = ("start", "eval", "save")  # phases


class Pace:
    """How long the phases of the last steps took, and what of them the step under way still has to do."""

    def __init__(self) -> None:
        self._steps: deque[dict[str, float]] = deque(maxlen=REMEMBERED)
        self._spent: dict[str, float] = {}
        self._running: tuple[str, float] = "", 0.0  # phase, and when it began (monotonic)
        self._saves = 0.0, UNMEASURED_SAVE  # what the loop waits for a checkpoint, and its writing beside the loop

    def observe(self, event: events.Event) -> None:
        match event:
            case events.PhaseStarted(phase, _):
                self._running = phase, time.monotonic()
            case events.PhaseFinished(phase, seconds):
                self._running = "", 0.0
                self._spent = self._spent | {phase: self._spent.get(phase, 0.0) + seconds}
                self._saves = (seconds if phase == "save" else self._saves[0]), self._saves[1]
            case events.CheckpointCompleted(_, seconds):
                self._saves = self._saves[0], seconds
            case events.StepFinished():
                self._steps.append({p: s for p, s in self._spent.items() if p not in NOT_OF_A_STEP})
                self._spent = {}

    def rest(self) -> float | None:
        """Seconds that the step under way still takes; None before the first measured step."""
        if not self._steps:
            return None
        spent, (phase, began) = dict(self._spent), self._running
        if "rollout" in spent:
            spent["rollout"] = math.inf  # there is one in a step, and a short one is over as well
        if phase:
            spent[phase] = spent.get(phase, 0.0) + time.monotonic() - began
        usual = {name: max(step.get(name, 0.0) for step in self._steps) for name in set().union(*self._steps)}
        return FACTOR * sum(max(0.0, seconds - spent.get(name, 0.0)) for name, seconds in usual.items())

    @property
    def saves(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._running[0] == "save"

    @property
    def save(self) -> float:
        """Seconds of a checkpoint."""
        return FACTOR * sum(self._saves)


class Stopping:
    """The request to stop, from any thread, and the decisions that follow from it, in the main thread. Observes the
    run, to know its pace."""

    def __init__(self, run_dir: Path, environment: Mapping[str, str] = os.environ) -> None:
        """A file in ``run_dir`` that is there already was meant for a run that has ended."""
        self._stop_file = run_dir / STOP_FILE
        with contextlib.suppress(OSError):
            self._stop_file.unlink()
        self._job_end = job_end(environment)
        self._inbox: SimpleQueue[tuple[str, float | None, float]] = SimpleQueue()  # a handler of a signal may put
        self._pace = Pace()
        self._deadline = math.inf  # monotonic, of the request
        self._asked = 0.0  # monotonic, of the first request
        self._leaves = False  # the step under way will not be finished
        self.source = ""  # of the request; "" without one
        self.hurried = False  # asked again
        self.step = -1  # under way; -1: the run has not begun
        self.updates = 0  # optimizer steps that it has made
        self.reported = -1  # steps of the last report
        self.show: Callable[[str], None] = lambda text: None  # a line for people
        self.show_left: Callable[[str], None] = lambda text: None  # on the progress line
        self.end: Callable[[str], None] | None = None  # interrupts the main thread: where nothing is to be saved

    # --- for any thread ----------------------------------------------------------------------------------------------

    def ask(self, source: str, seconds: float | None = None) -> None:
        """Request a stop within ``seconds``, by default those that are usual for this source. The handler of a signal
        may call it."""
        self._inbox.put((source, seconds, time.monotonic()))

    def watch(self) -> None:
        """Take requests from now on, in a thread of its own."""
        threading.Thread(target=self._watch, name="stopping", daemon=True).start()

    def _watch(self) -> None:
        while True:
            with contextlib.suppress(Empty):
                self._take(*self._inbox.get(timeout=LOOK_EVERY))
            self._look()
            if self.source and self.left < math.inf:
                self.show_left(self.text_left)
            if self.source and self.left <= CLOSING and (self.hurried or not self._pace.saves) and self.end is not None:
                self.end(f"stopped by {self.source}, and the time is over")
                return

    def _look(self) -> None:
        """Look for the file that requests a stop."""
        try:
            if not self._stop_file.is_file():  # a pipe, which would be waited for
                return
            with self._stop_file.open("rb") as file:
                text = file.read(MAX_SECONDS)
            self._stop_file.unlink()
        except OSError:
            return
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.inf
        seconds = math.inf if math.isnan(seconds) else seconds
        self._take(str(self._stop_file), seconds, time.monotonic())

    def _take(self, source: str, seconds: float | None, now: float) -> None:
        seconds = GRACE.get(source, math.inf) if seconds is None else seconds
        if not self.source:
            self._deadline, self._asked, self.source = now + seconds, now, source
            self.show(f"stopping: {source}, {self.text_left}: {self._plan()}")
            if self.end is not None and self.step < 0:
                self.end(f"stopped by {source}")
        elif now <= self._asked + SAME:  # whoever sent another signal may have less patience
            self._deadline = min(self._deadline, now + seconds)
        elif not self.hurried:
            self.hurried, self._deadline = True, min(self._deadline, now + LAST)
            self.show(f"stopping: {source} again: saving what can be saved within {LAST:g} s")

    # --- for the main thread -----------------------------------------------------------------------------------------

    def observe(self, event: events.Event) -> None:
        self._pace.observe(event)
        match event:
            case events.UpdateFinished():
                self.updates += 1
            case events.StepFinished(step):
                self.step, self.updates, self._leaves = step + 1, 0, False
            case events.MetricsReported(step):
                self.reported = step

    def begin(self, first: int) -> None:
        """The run has loaded what it continues, and does step ``first`` next."""
        self.step = first

    def check(self) -> None:
        """Raise Unfinished where the run has been asked to stop: between two steps."""
        if self.source or self.must_leave(drains=True):
            raise Unfinished

    def must_leave(self, *, drains: bool = False) -> bool:
        """Return whether the step under way cannot be finished, and has to be left now. ``drains``: in a rollout, of
        which nothing is lost: it goes on as long as possible where only the end of the job is near."""
        if self._leaves or self.step < 0 or (not self.source and self._job_end == math.inf):
            return self._leaves
        rest = self._pace.rest()
        if self.updates:  # neither the weights from before this step nor those after it are there to be saved
            leaves = self.left <= CLOSING
        elif self.source:
            leaves = self.left < math.inf and (rest is None or not self._fits(rest))
        else:
            leaves = not self._fits(0.0 if drains or rest is None else rest)
        if leaves:
            self._leaves = True
            if not self.source:
                self._take("the end of the job", self.left, time.monotonic())
        return leaves

    def _fits(self, seconds: float) -> bool:
        return self.left > seconds + self._pace.save + MARGIN

    @property
    def left(self) -> float:
        """Seconds until the run is killed; infinite where that is not known."""
        return min(self._deadline - time.monotonic(), self._job_end - time.time())

    @property
    def text_left(self) -> str:
        return "no time limit" if self.left == math.inf else f"{max(0.0, self.left):.0f} s left"

    def _plan(self) -> str:
        if self.step < 0:
            return "nothing has to be saved"
        rest = self._pace.rest()
        if rest is None and self.left < math.inf:
            return f"leaving step {self.step}, whose end cannot be estimated"
        if rest is None or self._fits(rest):
            return f"finishing step {self.step}" + (f" (about {rest:.0f} s)" if rest is not None else "")
        return f"leaving step {self.step}, which would take about {rest:.0f} s more"
