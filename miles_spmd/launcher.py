"""Ranks: whether a launcher (torchrun, srun) has made this process one, how a verb launches them, and what one runs."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from miles_spmd.config import Config
    from miles_spmd.protocol.pipe import Replay

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value: rollout.rollout_batch_size=8, rollout_batch_size=8, megatron.lr=1e-5, ..."),
]
Processes = Annotated[
    int | None, typer.Option("--nproc-per-node", min=1, help="Ranks to start here; default: one per GPU, or 1.")
]


def ranks(nproc: int | None) -> tuple[bool, int]:
    """Return whether this process is a rank, and the number of ranks that there are or that are to be launched:
    ``nproc``, or one per GPU of this machine, and 1 without any.

    A rank has its environment prepared for its device afterwards.
    """
    from miles_spmd.platform.cuda import prepare
    from miles_spmd.telemetry.environment import gpus

    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if gpus():
            prepare()
        return True, int(os.environ["WORLD_SIZE"])
    return False, nproc or max(1, len(gpus()))


def launch(world_size: int) -> NoReturn:
    """Run torchrun in this process, with ranks that run the present command, and exit with their status.

    A rank that fails has printed why, so torchrun's own account of it is silenced.
    """
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


def start(
    task: str, recipe: Path, overrides: list[str], nproc: int | None, replay: Replay | None = None
) -> tuple[Config, int]:
    """Run ``task`` as a rank, and return the configuration that it had and its exit status.

    Any other process launches ranks that do so, and exits with their status. ``task`` and ``replay`` are the worker's.
    """
    is_rank, world_size = ranks(nproc)
    config = load(recipe, overrides, world_size, check_files=task != "export")
    if not is_rank:
        launch(world_size)
    from miles_spmd.config.load import dump_config
    from miles_spmd.telemetry.environment import gpus, write_environment
    from miles_spmd.worker.main import main as worker

    if task == "eval":  # beside the training run of the same recipe, not in its folder
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": f"{config.run.name}-eval"})})
    config = resolve(config, {gpu.capability for gpu in gpus()})
    if os.environ["RANK"] == "0" and task != "export":
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / "config.toml").write_text(dump_config(config))
        write_environment(config.run_dir)
    return config, worker(config, task, replay)


def load(recipe: Path, overrides: list[str], world_size: int | None, *, check_files: bool) -> Config:
    """Return the configuration of ``recipe``; print its errors and exit where it has some."""
    from miles_spmd.config.load import ConfigError, load_config

    with failing(ConfigError, code=2):
        return load_config(recipe, overrides, world_size=world_size, check_files=check_files)


def resolve(config: Config, capabilities: Collection[str] | None) -> Config:
    """Return ``config`` with "auto" settings resolved for GPUs of these compute capabilities (None: unknown), and print
    the warnings about its settings."""
    from miles_spmd.config.checks import decide_parity, warnings

    config, reasons = decide_parity(config, capabilities)
    for warning in warnings(config):
        warn(warning)
    if config.run.mode == "rl":  # other modes have no rollout that parity could concern
        for reason in reasons:
            warn(f"determinism.parity is off: {reason}")
    return config


def warn(message: str) -> None:
    """Print a warning, on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"miles-spmd: warning: {message}", err=True)


def fail(message: str, code: int = 1) -> NoReturn:
    """Print an error, on the first rank only, and exit with ``code``."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"miles-spmd: error: {message}", err=True)
    sys.exit(code)


@contextlib.contextmanager
def failing(*kinds: type[Exception], code: int = 1) -> Iterator[None]:
    """Errors of these kinds that are raised inside are printed, and end the process with ``code``."""
    try:
        yield
    except kinds as error:
        fail(str(error), code)
