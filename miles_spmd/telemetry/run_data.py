"""What a run left in its folder, read back for people: finished, stopped, or still going."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles_spmd.telemetry.environment import Environment, read_environment
from miles_spmd.telemetry.metrics import is_score
from miles_spmd.telemetry.trackers import METRICS_FILE, read_metrics
from miles_spmd.telemetry.transcripts import Transcript, read_transcripts

Series = list[tuple[int, float]]  # (steps done, value)


@dataclass(frozen=True)
class Stage:
    """One run: a supervised or a reinforcement-learning stage of a larger one, or all there is."""

    name: str
    folder: Path
    steps: dict[int, dict[str, float]]  # metrics by the number of steps done
    settings_text: str  # config.toml as written
    transcripts: list[Transcript]
    environment: Environment | None

    @property
    def settings(self) -> dict[str, Any]:
        try:
            return tomllib.loads(self.settings_text)
        except tomllib.TOMLDecodeError:
            return {}

    @property
    def mode(self) -> str:
        return {"sft": "supervised", "rl": "reinforcement learning"}.get(
            self.settings.get("run", {}).get("mode", ""), ""
        )

    @property
    def done(self) -> int:
        return max(self.steps, default=0)

    @property
    def total(self) -> int | None:
        """Steps that were asked for, if config.toml is there to say it."""
        return self.settings.get("run", {}).get("num_rollout")

    @property
    def finished(self) -> bool:
        return self.total is not None and self.done >= self.total

    @property
    def seconds(self) -> float:
        """All of the run's time, start-up included."""
        return sum(value for _, value in self.series("perf/step_time"))

    @property
    def startup(self) -> float:
        return sum(value for _, value in self.series("perf/start_time"))

    def timed_steps(self) -> list[tuple[int, dict[str, float]]]:
        """The real steps: not the report of what came before the first, which has the start-up in it."""
        timed = [(step, values) for step, values in self.steps.items() if "perf/step_time" in values]
        return [(step, values) for step, values in timed if "perf/start_time" not in values]

    def series(self, metric: str) -> Series:
        return [(step, values[metric]) for step, values in self.steps.items() if metric in values]

    def scores(self) -> dict[str, Series]:
        """Score of each evaluation set over the steps."""
        names = dict.fromkeys(name for values in self.steps.values() for name in values if is_score(name))
        return {name.removeprefix("eval/"): self.series(name) for name in names}


def read_stages(run_dir: Path) -> list[Stage]:
    """The run in ``run_dir`` itself and in the folders directly in it, in the order in which they were started.

    Raises FileNotFoundError when there is none.
    """
    folders = [folder for folder in (run_dir, *sorted(run_dir.glob("*/"))) if (folder / METRICS_FILE).is_file()]
    if not folders:
        raise FileNotFoundError(f"{run_dir} holds no run: there is no {METRICS_FILE} in it or in a folder in it")
    stages = [_read_stage(folder) for folder in folders]
    return sorted(stages, key=lambda stage: min((v["time"] for v in stage.steps.values()), default=0.0))


def _read_stage(folder: Path) -> Stage:
    settings = folder / "config.toml"
    return Stage(
        name=folder.resolve().name,
        folder=folder,
        steps=read_metrics(folder / METRICS_FILE),
        settings_text=settings.read_text() if settings.is_file() else "",
        transcripts=read_transcripts(folder),
        environment=read_environment(folder),
    )
