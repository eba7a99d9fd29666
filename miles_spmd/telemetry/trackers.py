"""The trackers of a run's metrics: always a JSONL file; TensorBoard and Weights & Biases where configured."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from miles_spmd.config import Config

METRICS_FILE = "metrics.jsonl"
T = TypeVar("T")


class Tracker(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` after ``step`` steps (0: before the first). May be called more than once for a step."""

    def close(self) -> None:
        """Write what is not written yet."""


class JsonlTracker:
    """Writes one JSON object per call: ``step``, ``time`` (Unix seconds), then the metrics, null for those that are not
    finite. Every line is written unbuffered, so that a killed run leaves a readable file. A resumed run appends;
    :func:`read_metrics` lets the later line of a step win."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")  # the last run was killed within a line, which would swallow our first one

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {"step": step, "time": time.time()} | {name: float(value) for name, value in metrics.items()}
        self._file.write(msgspec.json.encode(row) + b"\n")

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Return the metrics by step, steps ascending. Objects of one step are merged and later values win. Incomplete
    lines, which a killed run leaves, are skipped, and so are nulls."""
    steps: dict[int, dict[str, float]] = {}
    for row in read_lines(path, dict[str, float | None]):
        values = {name: value for name, value in row.items() if value is not None}
        if "step" in values:
            steps.setdefault(int(values.pop("step")), {}).update(values)
    return dict(sorted(steps.items()))


def read_lines(path: Path, kind: type[T]) -> Iterator[T]:
    """Yield the lines of a JSONL file as values of ``kind``, without incomplete ones, which a killed run leaves."""
    for line in path.read_bytes().splitlines():
        with suppress(msgspec.DecodeError):
            yield msgspec.json.decode(line, type=kind)


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
    """Writes to Weights & Biases, offline where neither ``WANDB_MODE`` nor ``WANDB_API_KEY`` is set."""

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


class Trackers(list[Tracker]):
    """Several trackers as one."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self:
            tracker.log(step, metrics)


@contextmanager
def open_trackers(config: Config) -> Iterator[Trackers]:
    """Open all trackers that ``config`` asks for. Raises RuntimeError where a package is missing."""
    makers: list[Callable[[], Tracker]] = [lambda: JsonlTracker(config.run_dir / METRICS_FILE)]
    if config.telemetry.use_tensorboard:
        makers.append(lambda: TensorBoardTracker(config.run_dir / "tensorboard"))
    if config.telemetry.use_wandb:
        makers.append(lambda: WandbTracker(config))
    with ExitStack() as stack:
        yield Trackers([stack.enter_context(closing(make())) for make in makers])
