"""The numbers of a step as texts, for terminals and logs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

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


class StepLines:
    """The line of each step of the run ``name`` with ``total`` steps; 0: it evaluates only."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = printable(name, 200), total
        self._accuracies = True  # that every score so far can be one
        self._first: tuple[int, float] | None = None  # steps done at the first line, and when it was

    def line(self, done: int, metrics: Mapping[str, float]) -> str:
        """Return the line of a run of which ``done`` steps are done, the last one with ``metrics``."""
        place = f"step {done}/{self.total}" if self.total else f"evaluation after {done} steps"
        eta = f"eta {self.eta(done)}" if self.total else ""
        parts = [f"{self.name}: {place}", *self.scores(metrics), *shown(metrics), seconds(metrics), eta]
        return "  ".join(part for part in parts if part)

    def scores(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the mean accuracy over the evaluation sets as text, or each set's score where one was outside 0..1;
        nothing in a step without an evaluation."""
        scores = {name.removeprefix("eval/"): value for name, value in metrics.items() if is_score(name)}
        self._accuracies = self._accuracies and is_fraction(scores.values())
        if scores and self._accuracies:
            return [f"accuracy {sum(scores.values()) / len(scores):.3g}"]
        of = {name: f" of {printable(name, 80)}" if len(scores) > 1 else "" for name in scores}
        return [f"score{of[name]} {value:.3g}" for name, value in scores.items()]

    def eta(self, done: int) -> str:
        """Return the time left after ``done`` steps as text, from the mean time since the first call."""
        now = time.monotonic()
        if self._first is None:
            self._first = done, now  # a resumed run does not start at 0
            return "-:--"
        steps = max(done - self._first[0], 1)
        return clock((now - self._first[1]) / steps * (self.total - done))


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


def start(by_rank: Sequence[Mapping[str, float]], total: float) -> str:
    """Return where the ``total`` seconds of the start went, by the parts of the slowest rank."""
    rank = slowest(by_rank)
    parts = ", ".join(f"{part} {value:.1f}" for part, value in by_rank[rank].items())
    return f"start {total:.1f} s" + (f" (slowest rank {rank}: {parts})" if parts else "")


def slowest(by_rank: Sequence[Mapping[str, float]]) -> int:
    """Return the rank whose parts took longest."""
    return max(range(len(by_rank)), key=lambda rank: sum(by_rank[rank].values()))
