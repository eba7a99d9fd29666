"""Where metrics go: always a JSONL file, and TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from miles_spmd.config import Config

METRICS_FILE = "metrics.jsonl"


class Tracker(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` after ``step`` steps (0: before the first). May be called more than once for a step."""

    def close(self) -> None: ...


class JsonlTracker:
    """One JSON object per call: ``step``, ``time`` (Unix seconds), then the metrics; a number that is not finite is
    null. Every line is handed to the system at once, so that a killed run leaves a readable file. A run that resumes
    appends: readers let the later line of a step win, see :func:`read_metrics`."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")  # the last run was killed within a line: ours must not be lost with it

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {"step": step, "time": time.time()} | {name: float(value) for name, value in metrics.items()}
        self._file.write(msgspec.json.encode(row) + b"\n")

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Metrics by step, in order. Objects of one step are merged, later ones win; a broken line (a run killed while
    writing) is left out, and so is null."""
    steps: dict[int, dict[str, float]] = {}
    for row in _rows(path):
        values = {name: value for name, value in row.items() if isinstance(value, int | float)}
        steps.setdefault(int(values.pop("step")), {}).update(values)
    return dict(sorted(steps.items()))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines():
        try:
            row = msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            yield row


class TensorBoardTracker:
    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), write_to_disk=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Weights & Biases; ``WANDB_MODE`` decides between online and offline, and without a network it is offline."""

    def __init__(self, config: Config) -> None:
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError(
                "telemetry.use_wandb is set, but the package wandb is not installed: pip install 'miles-spmd[wandb]'"
            ) from error
        self._run = wandb.init(
            project=config.telemetry.wandb_project,
            name=config.run.name,
            dir=str(config.run_dir),
            config=config.model_dump(mode="json"),
            mode=None if "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ else "offline",
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        self._run.finish()


@contextmanager
def open_trackers(config: Config) -> Iterator[Tracker]:
    """All trackers that ``config`` asks for, as one. Raises RuntimeError where a package is missing."""
    trackers: list[Tracker] = [JsonlTracker(config.run_dir / METRICS_FILE)]
    if config.telemetry.use_tensorboard:
        trackers.append(TensorBoardTracker(config.run_dir / "tensorboard"))
    if config.telemetry.use_wandb:
        trackers.append(WandbTracker(config))
    every = _Every(trackers)
    try:
        yield every
    finally:
        every.close()


class _Every:
    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
