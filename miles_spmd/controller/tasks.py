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
    """Do ``task`` ("train", "eval", "export", "warm", or "replay" or "bisect" as ``order`` says) with connected ranks.
    Raises the error that ends the run."""
    if task == "export":
        checkpoints = Checkpoints(config, cluster)
        checkpoints.load()
        checkpoints.export()
        return
    recorded = Path(order.run) if order is not None and order.phase == "train" else None
    with open_parts(config, cluster, task, recorded) as parts:
        match task, order:
            case "train", None:
                sync.train(parts)
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
