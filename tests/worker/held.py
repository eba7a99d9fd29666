"""Started by torchrun in place of ``-m miles_spmd train``: a worker that does one thing of its own in one phase.

    held.py CONFIG PHASE RANK DEED

In that phase that rank touches the file ``held`` beside the configuration, with its process id in it, and then does the
deed: ``hang`` sleeps, ``raise`` raises, ``exhaust`` asks torch for more memory than any machine has. With ``engine``
the rank's engine raises in its third step, and with ``engines`` every one that it builds; rank -1 is each of them.
Everything else is the real worker.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

from miles_spmd.config.load import load_config
from miles_spmd.launcher import ranks
from miles_spmd.protocol.commands import Command, Generate, RefitEngine, TrainStep
from miles_spmd.protocol.results import Result
from miles_spmd.types.phase import Phase
from miles_spmd.worker import main as worker_main

COMMAND_OF = {Phase.ROLLOUT: Generate, Phase.TRAIN: TrainStep, Phase.REFIT: RefitEngine}


def main() -> int:
    ranks(None)
    path, phase, rank, deed = Path(sys.argv[1]), Phase(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    build = worker_main.build

    def do_deed() -> None:
        scratch = path.with_name("held.tmp")
        scratch.write_text(str(os.getpid()))
        scratch.rename(path.with_name("held"))
        if deed == "raise":
            raise RuntimeError("the deed is done")
        if deed == "exhaust":
            import torch

            torch.empty(2**60, dtype=torch.uint8)
        time.sleep(600)

    def build_held(*args: Any) -> Any:
        if phase is Phase.START:
            do_deed()
        worker = build(*args)
        if deed.startswith("engine"):
            break_engine(worker.turns.engine, for_ever=deed == "engines")
            return worker
        execute = worker.execute

        def execute_held(command: Command) -> Result:
            if isinstance(command, COMMAND_OF[phase]):
                do_deed()
            return execute(command)

        worker.execute = execute_held
        return worker

    if rank in (-1, int(os.environ["RANK"])):
        worker_main.build = build_held
    return worker_main.main(load_config(path))


def break_engine(engine: Any, for_ever: bool) -> None:
    owner: Any = type(engine) if for_ever else engine
    step, steps = owner.step, itertools.count()

    def broken(*args: Any) -> Any:
        if next(steps) >= 2:
            raise RuntimeError("the deed is done")
        return step(*args)

    owner.step = broken


if __name__ == "__main__":
    sys.exit(main())
