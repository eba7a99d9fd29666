"""The progress display of a run: a live bar on a terminal, lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from miles_spmd.config import Config
from miles_spmd.telemetry.metrics import is_fraction, is_score, phase_times
from miles_spmd.types.printable import printable

# The numbers of a step that are shown, in this order: name on screen -> metric.
SHOWN = {
    "reward": "rollout/raw_reward",
    "loss": "train/loss",
    "length": "rollout/response_len",
    "entropy": "train/entropy_loss",
    "kl": "train/kl_loss",
    "grad": "train/grad_norm",
}
SECONDS_BETWEEN_LINES = 2.0
SECONDS_BETWEEN_LEFT = 10.0  # of lines that show what is left to a run that is stopping


class Progress:
    """The display of kind ``none``, which shows nothing, and the interface of the others."""

    def __init__(self, config: Config, file: TextIO, steps: int) -> None:
        """Begin the display of a run of ``config`` in ``file``, with ``steps`` steps; 0: it evaluates only."""
        self._name, self._total, self._file = printable(config.run.name, 200), steps, file
        self._accuracies = True  # that every score so far can be one
        self._first: tuple[int, float] | None = None  # steps done at the first update, and when it was

    def phase(self, name: str) -> None:
        """Show that the run has entered the phase ``name``."""

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show that ``done`` steps are done (0: before the first), the last one with ``metrics``."""

    def note(self, text: str) -> None:
        """Print a line that every kind of display has."""
        print(f"{self._name}: {text}", file=self._file, flush=True)

    def left(self, text: str) -> None:
        """Show, about once a second, how much time is left to a run that is stopping."""

    def close(self) -> None:
        """End the display."""

    def _scores(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the mean accuracy over the evaluation sets as text, or each set's score where one was outside 0..1;
        nothing in a step without an evaluation."""
        scores = {name.removeprefix("eval/"): value for name, value in metrics.items() if is_score(name)}
        self._accuracies = self._accuracies and is_fraction(scores.values())
        if scores and self._accuracies:
            return [f"accuracy {sum(scores.values()) / len(scores):.3g}"]
        of = {name: f" of {printable(name, 80)}" if len(scores) > 1 else "" for name in scores}
        return [f"score{of[name]} {value:.3g}" for name, value in scores.items()]

    def _eta(self, done: int) -> str:
        """Return the time left after ``done`` steps as text, from the mean time of the steps so far."""
        now = time.monotonic()
        if self._first is None:
            self._first = done, now  # a resumed run does not start at 0
            return "-:--"
        steps = max(done - self._first[0], 1)
        return clock((now - self._first[1]) / steps * (self._total - done))


class PlainProgress(Progress):
    """Prints a line per step, at most one in two seconds; evaluations and the final step always get theirs."""

    _last_line = -SECONDS_BETWEEN_LINES
    _last_left = -math.inf  # monotonic

    def left(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last_left >= SECONDS_BETWEEN_LEFT:
            self._last_left = now
            self.note(f"stopping: {text}")

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        now, eta, scores = time.monotonic(), self._eta(done), self._scores(metrics)
        if now - self._last_line < SECONDS_BETWEEN_LINES and done < self._total and not scores:
            return
        self._last_line = now
        place = f"step {done}/{self._total}" if self._total else f"evaluation after {done} steps"
        parts = [
            f"{self._name}: {place}",
            *scores,
            *shown(metrics),
            seconds(metrics),
            f"eta {eta}" if self._total else "",
        ]
        print("  ".join(part for part in parts if part), file=self._file, flush=True)


class RichProgress(Progress):
    """Shows a bar with the present phase, and the newest numbers under it."""

    def __init__(self, config: Config, file: TextIO, steps: int) -> None:
        super().__init__(config, file, steps)
        self._newest: list[str] = []  # scores
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta {task.fields[eta]}"),
            TextColumn("[cyan]{task.fields[phase]:<9}"),
            expand=True,
        )
        self._task = self._bar.add_task(escape(self._name), total=self._total or None, eta="-:--", phase="start")
        self._live = Live(self._bar, console=Console(file=file), refresh_per_second=4)
        self._live.start()

    def phase(self, name: str) -> None:
        self._bar.update(self._task, phase=name)

    def note(self, text: str) -> None:
        self._live.console.print(Text(f"{self._name}: {text}"))

    def left(self, text: str) -> None:
        self._bar.update(self._task, description=f"{escape(self._name)} [yellow]stopping: {text}")

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        self._bar.update(self._task, completed=done, eta=self._eta(done))
        self._newest = self._scores(metrics) or self._newest
        numbers = [*self._newest, *shown(metrics)]
        self._live.update(Group(self._bar, Text("  ".join(numbers), "green"), Text(seconds(metrics), "dim")))

    def close(self) -> None:
        self.phase("")
        self._live.stop()


KINDS: dict[str, type[Progress]] = {"rich": RichProgress, "plain": PlainProgress, "none": Progress}


@contextmanager
def open_progress(config: Config, file: TextIO | None = None, *, training: bool = True) -> Iterator[Progress]:
    """Open the display of ``telemetry.progress``; ``auto`` is ``rich`` on a terminal and ``plain`` elsewhere.

    Without ``training`` the run evaluates only, and has no steps.
    """
    file, kind = file or sys.stdout, config.telemetry.progress
    if kind == "auto":
        kind = "rich" if file.isatty() else "plain"
    with closing(KINDS[kind](config, file, config.run.num_rollout if training else 0)) as progress:
        yield progress


# --- texts ----------------------------------------------------------------------------------------------------------


def shown(metrics: Mapping[str, float]) -> list[str]:
    """Return the numbers of a step as texts such as ``loss 0.01``."""
    return [f"{word} {metrics[name]:.3g}" for word, name in SHOWN.items() if name in metrics]


def seconds(metrics: Mapping[str, float]) -> str:
    """Return the time of a step as ``1.42 s (rollout 0.61, train 0.70)``."""
    total = metrics.get("perf/step_time")
    phases = ", ".join(f"{phase} {value:.2f}" for phase, value in phase_times(metrics).items() if value >= 0.005)
    return "" if total is None else f"{total:.2f} s" + (f" ({phases})" if phases else "")


def clock(duration: float) -> str:
    """Return a duration in seconds as a clock shows it: 3725.2 as ``1:02:05``, 65 as ``1:05``."""
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
