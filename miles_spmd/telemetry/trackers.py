"""The trackers of a run's metrics: always a JSONL file; TensorBoard and Weights & Biases where configured."""

from __future__ import annotations

import itertools
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from miles_spmd.config import Config
from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.plugins.run import Tracker, TrackerFactory
from miles_spmd.telemetry.json_lines import Lines, LineWriter, cut
from miles_spmd.types.files import AppendedFile
from miles_spmd.types.run_files import METRICS_FILE
from miles_spmd.types.secrets import scrub

FACTORIES: PlugPoint[TrackerFactory] = PlugPoint("telemetry.tracker", {}, TrackerFactory)
TENSORBOARD_FOLDER = "tensorboard"


class JsonlTracker:
    """Writes one JSON object per call: ``step``, ``time`` (Unix seconds), then the metrics, null for those that are not
    finite. A resumed run appends; of a step with several lines :func:`read_metrics` lets the later one win."""

    def __init__(self, path: Path) -> None:
        """Open the file, and cut off an incomplete line at its end. Print a warning that names lines that cannot be
        read and steps that are missing: a run that was killed, or whose disk was full, leaves them."""
        found = Lines(path, dict[str, float | None])
        for problem in filter(None, (found.problem, missing_steps(path, by_step(found.values)))):
            print(f"miles-spmd: warning: {problem}; the run goes on and appends", file=sys.stderr, flush=True)
        self._path, self._lines = path, LineWriter(path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._lines.write({"step": step, "time": time.time()} | {n: float(value) for n, value in metrics.items()})

    def rewind(self, step: int) -> None:
        self._lines.close()
        cut(self._path, step)
        self._lines = LineWriter(self._path)

    def close(self) -> None:
        self._lines.close()


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Return the metrics by step, steps ascending. Objects of one step are merged and later values win. Incomplete
    lines, which a killed run leaves, are skipped, and so are nulls."""
    return by_step(Lines(path, dict[str, float | None]).values)


def missing_steps(path: Path, steps: Collection[int]) -> str:
    """Return which steps between the first and the last are missing, in words; "" where none is."""
    gaps = [(a + 1, b - 1) for a, b in itertools.pairwise(sorted(steps)) if b - a > 1]
    named = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in gaps[:8]) + (", ..." if len(gaps) > 8 else "")
    return f"{path}: has no metrics of {sum(b - a + 1 for a, b in gaps)} steps: {named}" if gaps else ""


def by_step(rows: Iterable[dict[str, float | None]]) -> dict[int, dict[str, float]]:
    """Return rows of the file by their steps."""
    steps: dict[int, dict[str, float]] = {}
    for row in rows:
        values = {name: value for name, value in row.items() if value is not None}
        if 0 <= values.get("step", -1) < 2**53:
            steps.setdefault(int(values.pop("step")), {}).update(values)
    return dict(sorted(steps.items()))


class TensorBoardTracker:
    """Writes an event file by itself, because a full disk has to be noticed: a SummaryWriter writes in a thread, whose
    end nobody would hear of."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import masked_crc32c
        from tensorboardX.summary import scalar

        self._event, self._scalar, self._crc = Event, scalar, masked_crc32c
        self._start = SessionLog(status=SessionLog.START)
        self._file = AppendedFile(folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}")
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._append(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))

    def rewind(self, step: int) -> None:
        """Events stay in the file, and TensorBoard discards those of later steps when it reads this one."""
        self._append(self._event(wall_time=time.time(), step=step + 1, session_log=self._start))

    def close(self) -> None:
        self._file.close()

    def _append(self, event: Any) -> None:
        """Append a record of TFRecord's format: length, its CRC, the event, its CRC."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.append(b"".join([length, self._checksum(length), data, self._checksum(data)]))

    def _checksum(self, data: bytes) -> bytes:
        return struct.pack("<I", self._crc(data))


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
            config=scrub(config.model_dump(mode="json")),
            mode=None if "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ else "offline",
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def rewind(self, step: int) -> None:
        """Each attempt is a run of its own there."""

    def close(self) -> None:
        self._run.finish()


class UsersTracker:
    """What a user's function has made: whatever its methods raise is an error that names the setting."""

    def __init__(self, name: str, config: Config) -> None:
        tracker = FACTORIES.resolve(name)(config)
        methods = [getattr(tracker, method, None) for method in ("log", "rewind", "close")]
        if not all(map(callable, methods)):
            raise FACTORIES.returned(name, tracker, "an object with the methods log, rewind and close")
        self.log, self.rewind, self.close = (FACTORIES.guarded(name, method) for method in methods if method)


class Trackers(list[Tracker]):
    """Several trackers as one."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self:
            tracker.log(step, metrics)

    def rewind(self, step: int) -> None:
        for tracker in self:
            tracker.rewind(step)


@contextmanager
def open_trackers(config: Config) -> Iterator[Trackers]:
    """Open all trackers that ``config`` asks for. Raises RuntimeError where a package is missing."""
    makers: list[Callable[[], Tracker]] = [lambda: JsonlTracker(config.run_dir / METRICS_FILE)]
    if config.telemetry.use_tensorboard:
        makers.append(lambda: TensorBoardTracker(config.run_dir / TENSORBOARD_FOLDER))
    if config.telemetry.use_wandb:
        makers.append(lambda: WandbTracker(config))
    if (name := config.telemetry.tracker) is not None:
        makers.append(lambda: UsersTracker(name, config))
    with ExitStack() as stack:
        yield Trackers([stack.enter_context(closing(make())) for make in makers])
