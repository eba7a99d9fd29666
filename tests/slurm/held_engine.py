"""An engine that holds the run in a phase: the reference engine, which makes this rank wait before a command.

The environment's HOLD names a file; while it exists, the rank waits before the command of that name once the run has a
checkpoint to continue from, and says so in a file beside it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from miles_spmd.protocol.commands import Command, Generate, SaveCheckpoint, TrainStep
from miles_spmd.protocol.results import Result
from miles_spmd.worker.worker import Worker
from tests.reference_engine import TorchEngine

CHECKPOINT = "checkpoints/step_000002"  # in the folder of the training run


class HeldEngine(TorchEngine):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        execute = Worker.__dict__["execute"]
        for command in (Generate, TrainStep, SaveCheckpoint):
            execute.register(command, held(execute.dispatcher.dispatch(command)))


def held(handler: Any) -> Any:
    def wait_and_handle(worker: Worker, command: Command) -> Result:
        trained = Path(str(worker._config.run_dir).removesuffix("-eval"))
        wait(type(command).__name__, trained / CHECKPOINT)
        result: Result = handler(worker, command)
        return result

    return wait_and_handle


def wait(command: str, checkpoint: Path) -> None:
    hold = Path(os.environ.get("HOLD", "no hold"))
    while checkpoint.exists() and hold.exists() and hold.read_text() == command:
        hold.with_name("held").touch()
        time.sleep(0.05)
