"""The tasks of a run, each over the parts that it requires."""

from __future__ import annotations

from pathlib import Path

from miles_spmd.config import Config
from miles_spmd.controller.attempts import AttemptWriter
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.cluster.errors import Unfinished
from miles_spmd.controller.journal.stopping import Stopping
from miles_spmd.controller.loops import replay, sync
from miles_spmd.controller.loops.generate import generate
from miles_spmd.controller.loops.serve import serve
from miles_spmd.controller.parts import open_generation, open_parts
from miles_spmd.controller.run_folder import changed_settings
from miles_spmd.protocol.last_words import warn
from miles_spmd.protocol.pipe import Replay
from miles_spmd.telemetry.responses import RESPONSES_FILE, steps_written
from miles_spmd.telemetry.trackers import read_metrics
from miles_spmd.types.run_files import METRICS_FILE, adopt_config


def run(
    config: Config, cluster: Cluster, attempt: AttemptWriter, stopping: Stopping, order: Replay | None = None
) -> str:
    """Do the attempt's task ("train", "generate", "serve", "eval", "warm", or "replay" or "bisect" as ``order`` says)
    with connected ranks. Returns "", or where it ended because it was requested to stop, what is saved. Raises the
    error that ends the run."""
    task = attempt.record.task
    if task == "generate":
        with open_generation(config, cluster, attempt, stopping) as generating:
            first = _steps_generated(config.run_dir) if config.checkpoint.resume else 0
            if first and (changed := changed_settings(config.run_dir)):
                warn(
                    f"{config.run_dir / RESPONSES_FILE}: responses from step {first} on are generated with other "
                    f"settings than those before: {', '.join(changed)}; take another run.name to keep them apart"
                )
            adopt_config(config.run_dir)
            attempt.ready(first, [info.host for info in cluster.infos])
            return generate(generating, first)
    if task == "serve":
        serve(config, cluster, attempt, stopping)
        return ""
    recorded = Path(order.run) if order is not None and order.phase == "train" else None
    with open_parts(config, cluster, attempt, stopping, recorded) as parts:
        match task, order:
            case "train", None:
                try:
                    sync.train(parts)
                except Unfinished:
                    return sync.leave(parts)
            case "warm", None:
                sync.warm(parts)
            case "eval", None:
                sync.evaluate(parts, parts.first, begins=True)
                parts.journal.report(parts.first)
            case "replay", Replay():
                replay.replay(parts, order)
            case "bisect", Replay():
                replay.bisect(parts, order)
            case _:
                raise ValueError(f"task {task!r} with order {order}")
    return ""


def _steps_generated(run_dir: Path) -> int:
    """Return the number of steps whose responses are written. Raises OSError."""
    done = max(read_metrics(run_dir / METRICS_FILE), default=0)
    written = steps_written(run_dir, done)
    if written < done:
        warn(
            f"{run_dir / RESPONSES_FILE}: responses of the {done} steps that were done are missing; "
            f"those behind {written} steps are generated again"
        )
    return written
