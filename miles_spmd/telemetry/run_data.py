"""The stages of a run, read back from their folders: finished, stopped or still going."""

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
    """One run: a supervised or a reinforcement-learning stage of a larger one, or the only one."""

    name: str
    mode: str  # run.mode, "" without config.toml
    done: int  # steps
    total: int | None  # steps that config.toml asks for, None without config.toml
    started: float  # Unix seconds
    series: dict[str, Series]  # of each metric, steps ascending
    transcripts: list[Transcript]
    config: str  # the text of config.toml, "" without one
    environment: Environment | None

    @property
    def finished(self) -> bool:
        return self.total is not None and self.done >= self.total

    def values(self, metric: str) -> list[float]:
        """Return the values of ``metric`` over the steps, an empty list where the run has not written it."""
        return [value for _, value in self.series.get(metric, [])]

    def scores(self) -> dict[str, Series]:
        """Return the score of each evaluation set over the steps, by the set's name."""
        return {name.removeprefix("eval/"): series for name, series in self.series.items() if is_score(name)}


def read_stages(run_dir: Path) -> list[Stage]:
    """Return the run in ``run_dir`` itself and those in the folders directly in it, in the order in which they started.

    Raises FileNotFoundError where there is none.
    """
    folders = [folder for folder in (run_dir, *sorted(run_dir.glob("*/"))) if (folder / METRICS_FILE).is_file()]
    if not folders:
        raise FileNotFoundError(f"{run_dir} contains no run: no {METRICS_FILE} in it or in a folder in it")
    return sorted(map(_read_stage, folders), key=lambda stage: stage.started)


def _read_stage(folder: Path) -> Stage:
    steps = read_metrics(folder / METRICS_FILE)
    series: dict[str, Series] = {}
    for step, values in steps.items():
        for name, value in values.items():
            series.setdefault(name, []).append((step, value))
    times = [time for _, time in series.pop("time", [])]
    path = folder / "config.toml"
    config = path.read_text() if path.is_file() else ""
    run = _parse(config).get("run", {})
    return Stage(
        name=folder.resolve().name,
        mode=run.get("mode", ""),
        done=max(steps, default=0),
        total=run.get("num_rollout"),
        started=min(times, default=0.0),
        series=series,
        transcripts=read_transcripts(folder),
        config=config,
        environment=read_environment(folder),
    )


def _parse(config: str) -> dict[str, Any]:
    """Return the tables of ``config``, none where a killed run has left half of it."""
    try:
        return tomllib.loads(config)
    except tomllib.TOMLDecodeError:
        return {}
