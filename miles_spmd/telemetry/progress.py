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
from miles_spmd.telemetry.metrics import is_score
from miles_spmd.telemetry.texts import StepLines, seconds, shown

SECONDS_BETWEEN_LINES = 2.0
SECONDS_BETWEEN_LEFT = 10.0  # of lines that show what is left to a run that is stopping


class Progress:
    """The display of kind ``none``, which shows nothing, and the interface of the others."""

    def __init__(self, config: Config, file: TextIO, steps: int) -> None:
        """Begin the display of a run of ``config`` in ``file``, with ``steps`` steps; 0: it evaluates only."""
        self._texts, self._file = StepLines(config.run.name, steps), file

    def tell(self, text: str) -> None:
        """Show a line about the run."""

    def phase(self, name: str) -> None:
        """Show that the run has entered the phase ``name``."""

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show that ``done`` steps are done (0: before the first), the last one with ``metrics``."""

    def note(self, text: str) -> None:
        """Print a line that every kind of display has."""
        print(f"{self._texts.name}: {text}", file=self._file, flush=True)

    def left(self, text: str) -> None:
        """Show, about once a second, how much time is left to a run that is stopping."""

    def close(self) -> None:
        """End the display."""


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
        now, line = time.monotonic(), self._texts.line(done, metrics)
        wanted = done >= self._texts.total or any(map(is_score, metrics))
        if wanted or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(line, file=self._file, flush=True)

    def tell(self, text: str) -> None:
        self.note(text)


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
        self._task = self._bar.add_task(escape(self._texts.name), total=steps or None, eta="-:--", phase="start")
        self._live = Live(self._bar, console=Console(file=file), refresh_per_second=4)
        self._live.start()

    def phase(self, name: str) -> None:
        self._bar.update(self._task, phase=name)

    def note(self, text: str) -> None:
        self._live.console.print(Text(f"{self._texts.name}: {text}"))

    def left(self, text: str) -> None:
        self._bar.update(self._task, description=f"{escape(self._texts.name)} [yellow]stopping: {text}")

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        self._bar.update(self._task, completed=done, eta=self._texts.eta(done))
        self._newest = self._texts.scores(metrics) or self._newest
        numbers = [*self._newest, *shown(metrics)]
        self._live.update(Group(self._bar, Text("  ".join(numbers), "green"), Text(seconds(metrics), "dim")))

    def tell(self, text: str) -> None:
        self.note(text)

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
