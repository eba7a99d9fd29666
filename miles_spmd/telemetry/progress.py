"""The progress display of a run: a live bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from miles_spmd.config import Config
from miles_spmd.telemetry.metrics import is_score, phase_times

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


class Progress:
    """The display of kind ``none``, which shows nothing, and the interface of the others."""

    def __init__(self, config: Config, file: TextIO) -> None:
        """Begin the display of a run of ``config`` in ``file``."""
        self._name, self._total, self._file = config.run.name, config.run.num_rollout, file
        self._first: tuple[int, float] | None = None  # steps done at the first update, and when it was

    def phase(self, name: str) -> None:
        """Show that the run has entered the phase ``name``."""

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show that ``done`` steps are done (0: before the first), the last one with ``metrics``."""

    def close(self) -> None:
        """End the display."""

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

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        now, eta = time.monotonic(), self._eta(done)
        if now - self._last_line < SECONDS_BETWEEN_LINES and done < self._total and accuracy(metrics) is None:
            return
        self._last_line = now
        parts = [f"{self._name}: step {done}/{self._total}", *shown(metrics), seconds(metrics), f"eta {eta}"]
        print("  ".join(part for part in parts if part), file=self._file, flush=True)


class RichProgress(Progress):
    """Shows a bar with the present phase, and the newest numbers under it."""

    def __init__(self, config: Config, file: TextIO) -> None:
        super().__init__(config, file)
        self._accuracy: list[str] = []
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta {task.fields[eta]}"),
            TextColumn("[cyan]{task.fields[phase]:<9}"),
            expand=True,
        )
        self._task = self._bar.add_task(self._name, total=self._total, eta="-:--", phase="start")
        self._live = Live(self._bar, console=Console(file=file), refresh_per_second=4)
        self._live.start()

    def phase(self, name: str) -> None:
        self._bar.update(self._task, phase=name)

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        self._bar.update(self._task, completed=done, eta=self._eta(done))
        numbers = shown(metrics)
        if accuracy(metrics) is not None:
            self._accuracy = [numbers.pop(0)]
        numbers = self._accuracy + numbers
        self._live.update(Group(self._bar, Text("  ".join(numbers), "green"), Text(seconds(metrics), "dim")))

    def close(self) -> None:
        self.phase("")
        self._live.stop()


KINDS: dict[str, type[Progress]] = {"rich": RichProgress, "plain": PlainProgress, "none": Progress}


@contextmanager
def open_progress(config: Config, file: TextIO | None = None) -> Iterator[Progress]:
    """Open the display of ``telemetry.progress``; ``auto`` is ``rich`` on a terminal and ``plain`` elsewhere."""
    file, kind = file or sys.stdout, config.telemetry.progress
    if kind == "auto":
        kind = "rich" if file.isatty() else "plain"
    with closing(KINDS[kind](config, file)) as progress:
        yield progress


# --- texts ----------------------------------------------------------------------------------------------------------


def accuracy(metrics: Mapping[str, float]) -> float | None:
    """Return the mean pass@1 over the evaluation sets, None in a step without an evaluation."""
    scores = [value for name, value in metrics.items() if is_score(name)]
    return sum(scores) / len(scores) if scores else None


def shown(metrics: Mapping[str, float]) -> list[str]:
    """Return the numbers of a step as texts such as ``loss 0.01``, ``accuracy`` first where there was an evaluation."""
    held_out = accuracy(metrics)
    numbers = {} if held_out is None else {"accuracy": held_out}
    numbers |= {word: metrics[name] for word, name in SHOWN.items() if name in metrics}
    return [f"{word} {value:.3g}" for word, value in numbers.items()]


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
