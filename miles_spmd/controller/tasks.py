"""The tasks of a run, each over the parts that it requires."""

from __future__ import annotations

from pathlib import Path

from miles_spmd.config import Config
from miles_spmd.controller.checkpoints import Checkpoints
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.loops import replay, sync
from miles_spmd.controller.parts import open_parts
from miles_spmd.protocol.pipe import Replay


def run(config: Config, cluster: Cluster, task: str = "train", order: Replay | None = None) -> None:
    """Do ``task`` ("train", "eval", "export", or "replay" or "bisect" as ``order`` says) with connected ranks. Raises
    the error that ends the run."""
    match task, order:
        case "train", None:
            with open_parts(config, cluster, ledger=True) as parts:
                sync.train(parts)
        case "eval", None:
            with open_parts(config, cluster, training=False) as parts:
                if sync.evaluation_due(parts, parts.first, begins=True):
                    sync.evaluate(parts, parts.first)
                parts.journal.report(parts.first)
        case "export", None:
            checkpoints = Checkpoints(config, cluster)
            checkpoints.load()
            checkpoints.export()
        case "replay", Replay(run=folder, phase=phase):
            recorded = Path(folder) if phase == "train" else None
            with open_parts(config, cluster, ledger=True, recorded=recorded) as parts:
                replay.replay(parts, order)
        case "bisect", Replay():
            with open_parts(config, cluster) as parts:
                replay.bisect(parts, order)
        case _:
            raise ValueError(f"task {task!r} with order {order}")
