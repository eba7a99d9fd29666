"""Ranks: what a launcher (torchrun, srun) has made of this process, and how a verb launches them itself."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, NoReturn

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value: rollout.rollout_batch_size=8, rollout_batch_size=8, megatron.lr=1e-5, ..."),
]
Processes = Annotated[
    int | None, typer.Option("--nproc-per-node", min=1, help="Ranks to start here; default: one per GPU, or 1.")
]


def ranks(nproc: int | None) -> tuple[bool, int]:
    """Whether this process is a rank, which is then ready to use its device; and how many ranks there are, or are to
    be launched."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _prepare_device()
        return True, int(os.environ["WORLD_SIZE"])
    return False, nproc or default_processes()


def _prepare_device() -> None:
    from miles_spmd.platform.cuda import prepare
    from miles_spmd.telemetry.environment import gpus

    if gpus():
        prepare()


def launch(world_size: int) -> NoReturn:
    """torchrun, in this process: its ranks run this same command. When one fails they have said why, so torchrun's own
    account of it is left out."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(["--standalone", f"--nproc-per-node={world_size}", "-m", "miles_spmd", *sys.argv[1:]])
    except ChildFailedError as error:
        code = max(failure.exitcode for failure in error.failures.values())
        raise SystemExit(code if code > 0 else 1) from None
    except SignalException as signal:
        raise SystemExit(128 + signal.sigval) from None
    raise SystemExit(0)


def default_processes() -> int:
    from miles_spmd.telemetry.environment import gpus

    return max(1, len(gpus()))


def fail(message: str, code: int = 1) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"miles-spmd: {message}", err=True)
    sys.exit(code)
