"""Ranks: whether a launcher (torchrun, srun) has made this process one, how a verb launches them, and what one runs."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import psutil
import typer

from miles_spmd.types.cell import CELL, Cell
from miles_spmd.types.printable import MAX_LINE, printable
from miles_spmd.types.run_files import ENGINES_ALONE

if TYPE_CHECKING:
    from miles_spmd.config import Config
    from miles_spmd.protocol.pipe import Replay

STOP_SIGNALS = signal.SIGTERM, signal.SIGUSR1
JOB_RANKS = "MILES_SPMD_RANKS"  # environment: the ranks of a job that are not started by this process alone
EXAMINED = "MILES_SPMD_EXAMINED"  # set for ranks whose launcher has examined what the configuration names


def _complete_override(incomplete: str) -> list[str]:
    """The settings that begin with what was typed, for the shell."""
    from miles_spmd.config import Config
    from miles_spmd.config.table import walk

    names = [name for s in walk(Config) if not s.is_table for name in (s.dotted, s.path[-1])]
    return [f"{name}=" for name in names if name.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="key=value: rollout.rollout_batch_size=8, rollout_batch_size=8, megatron.lr=1e-5, ...",
        autocompletion=_complete_override,
    ),
]
Processes = Annotated[
    int | None, typer.Option("--nproc-per-node", min=1, help="Ranks to start here; default: one per GPU, or 1.")
]


def ranks(nproc: int | None) -> tuple[bool, int]:
    """Return whether this process is a rank, which torchrun has made it, or srun as one of several tasks, and the
    number of ranks that there are or that are to be launched: ``nproc``, or one per GPU of this machine, and 1 without
    any. Prints what is wrong with the variables of the environment that a run reads, and exits.

    A rank has its environment prepared for its device afterwards.
    """
    from miles_spmd.platform.cuda import prepare
    from miles_spmd.telemetry.environment import gpus

    world_size = _world_size()
    if world_size is None:
        return False, nproc or max(1, len(gpus()))
    if gpus():
        prepare()
    return True, world_size


def ranks_for(recipe: Path, overrides: list[str], nproc: int | None) -> tuple[bool, int]:
    """Return what :func:`ranks` does, for one cell where the configuration has several. Without ``nproc`` they divide
    the GPUs of this machine, or the ranks that a job has for all cells."""
    from miles_spmd.config.load import ConfigError, load_config
    from miles_spmd.types.variables import VariableError, whole

    is_rank, world_size = ranks(nproc)
    if is_rank or nproc is not None:
        return is_rank, world_size
    cells = 1
    with contextlib.suppress(ConfigError):  # which is raised when the configuration is loaded to be used
        cells = load_config(recipe, overrides, check_files=False, trains=False).resilience.cells
    with failing(VariableError, code=2):
        return False, max(1, whole(JOB_RANKS, world_size, least=1) // cells)


def _world_size() -> int | None:
    """Return the number of ranks where this process is one of them. Exits as :func:`ranks` does."""
    from miles_spmd.protocol.last_words import say
    from miles_spmd.types.variables import VariableError, job_end, whole
    from miles_spmd.worker.slurm_task import SlurmTaskError, adopt

    try:
        adopt()
        whole("SLURM_RESTART_COUNT", 0)
        whole("SLURM_CPUS_ON_NODE", 1, least=1)
        job_end(os.environ)
        if "RANK" not in os.environ:
            return None
        from miles_spmd.worker.meeting import Place

        return Place.from_environment().world_size
    except (SlurmTaskError, VariableError) as error:
        remedy = "; unset RANK and WORLD_SIZE where this process is to start its ranks itself"
        say(f"error: {error}{remedy if 'RANK' in os.environ else ''}")
        sys.exit(2)


def launch(world_size: int, cell: Cell | None = None) -> NoReturn:
    """Run torchrun in this process, with ranks that run the present command, and exit with their status.

    A rank that fails has printed why, so torchrun's own account of it is silenced. A signal to stop is passed on to the
    ranks, and the run ends by itself: torchrun would kill it 30 seconds later. With ``--standalone``, torchrun
    would open a store for everyone on the network and unpickle what it finds there; here its store is a file in a
    private folder, in which the ranks meet, too.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from miles_spmd.protocol import last_words
    from miles_spmd.protocol.pipe import LAUNCHER, REQUEUE, SUPERVISOR
    from miles_spmd.telemetry.environment import gpus
    from miles_spmd.worker.meeting import FOLDER, made_by_launcher

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[EXAMINED] = "1"
    logging.disable()
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(made_by_launcher())
        except OSError as error:
            fail(
                f"ranks meet in a folder for temporary files, and none can be written ({error}); set TMPDIR to one "
                "that can"
            )
        stack.callback(_ignore_stops)  # what comes while Python ends would change the status
        os.environ[FOLDER] = str(folder)
        os.environ[LAUNCHER] = str(os.getpid())
        unsaid = Path(folder, "unsaid")
        if cell is None:  # else the run does not end with these ranks, and the controller says what becomes of them
            unsaid.touch()
        else:
            os.environ.setdefault(SUPERVISOR, str(os.getppid()))
        os.environ[last_words.VARIABLE] = str(unsaid)
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torchrun would offer another store to the ranks
        options = ["--rdzv-backend=c10d", f"--rdzv-endpoint={folder}/launcher", "--rdzv-conf=store_type=file"]
        options.append(f"--signals-to-handle=SIGINT,SIGQUIT{'' if _is_hangup_ignored() else ',SIGHUP'}")
        for number in STOP_SIGNALS:
            signal.signal(number, _pass_on)
        if gpus() and Path("/sys/devices/system/node/node1").exists() and shutil.which("numactl"):
            options.append("--numa-binding=node")  # the memory that a rank allocates is then near its GPU, too
        command = ["-m", "miles_spmd", *sys.argv[1:]]
        try:
            torchrun([*options, "--local-addr=localhost", f"--nproc-per-node={world_size}", *command])
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            code = max(failure.exitcode for failure in error.failures.values())
            status = failure.exitcode
            if -status in STOP_SIGNALS:  # a rank that has begun passes them on to the controller
                last_words.say_for_others(f"start: stopped by {signal.Signals(-status).name}")
                raise SystemExit(REQUEUE) from None
            how = f"was killed by {failure.signal_name()}" if status < 0 else f"ended with status {status}"
            last_words.say_for_others(f"rank {rank} (pid {failure.pid}) {how}, and no process of the run said why")
            raise SystemExit(code if code > 0 else 1) from None
        except SignalException as error:
            last_words.say_for_others(f"start: stopped by {signal.Signals(error.sigval).name}")
            raise SystemExit(REQUEUE if error.sigval in STOP_SIGNALS else 128 + error.sigval) from None
    raise SystemExit(0)


def _is_hangup_ignored() -> bool:
    """Return whether this process was started by nohup, or in another way that lets it outlive its terminal."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def _end_at_once(number: int, frame: FrameType | None) -> None:
    """Handle a signal before ranks are launched, when there is nothing to save. No exception: imports may catch it."""
    from miles_spmd.protocol.last_words import say
    from miles_spmd.protocol.pipe import REQUEUE

    if CELL not in os.environ:  # else the controller says what becomes of the run
        say(f"start: stopped by {signal.Signals(number).name}")
    os._exit(REQUEUE if number in STOP_SIGNALS else 128 + number)


def _ignore_stops() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Handle a signal to stop: pass it on to the ranks, or end where there are none yet."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    ranks = psutil.Process().children()
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
    if not ranks:
        raise SignalException("before any rank", signal.Signals(number))


def start(
    task: str, recipe: Path, overrides: list[str], nproc: int | None, replay: Replay | None = None
) -> tuple[Config, int]:
    """Run ``task`` as a rank, and return the configuration that it had and its exit status.

    Any other process launches ranks that do so, and exits with their status. ``task`` and ``replay`` are the worker's.
    """
    is_rank, world_size = ranks_for(recipe, overrides, nproc)
    cell = Cell.from_environment()
    if not is_rank:
        for number in (*STOP_SIGNALS, signal.SIGINT, *([] if _is_hangup_ignored() else [signal.SIGHUP])):
            signal.signal(number, _end_at_once)
    config = load(recipe, overrides, world_size, check_files=cell is None, task=task)
    if task != "train":  # there is nothing to lose
        config = undivided(config)
    if config.resilience.cells > 1 and cell is None:
        if is_rank:
            fail("resilience.cells: cells have launchers of their own, start `miles-spmd train` without one", code=2)
        return config, supervise(config, task, recipe, world_size)
    lock: AbstractContextManager[Any] = nullcontext()
    if cell is None:
        config, lock = begin(config, task, recipe, rank=int(os.environ["RANK"]) if is_rank else None)
    if not is_rank:
        launch(world_size, cell)
    from miles_spmd.controller.run_folder import describe
    from miles_spmd.telemetry.environment import gpus
    from miles_spmd.worker.main import main as worker

    config = resolve(config, {gpu.capability for gpu in gpus()}, quiet=task not in ("train", "eval"))
    with lock:
        if os.environ["RANK"] == "0" and cell is None:
            with failing(OSError):
                describe(config, task)
        return config, worker(config, task, replay)


def supervise(config: Config, task: str, recipe: Path, world_size: int) -> int:
    """Start the controller, and ``world_size`` ranks for each cell; return the run's status."""
    from miles_spmd.controller.run_folder import describe
    from miles_spmd.supervisor import Supervisor
    from miles_spmd.telemetry.environment import gpus

    config, _ = begin(config, task, recipe, rank=None)
    config, lock = begin(config, task, recipe, rank=0)
    config = resolve(config, {gpu.capability for gpu in gpus()})
    os.environ[EXAMINED] = "1"
    with lock:
        with failing(OSError):
            describe(config, task)
        return Supervisor(config, task, world_size).run()


def undivided(config: Config) -> Config:
    """Return ``config`` for ranks that are not divided into cells."""
    return config.model_copy(update={"resilience": config.resilience.model_copy(update={"cells": 1})})


def begin(config: Config, task: str, recipe: Path, *, rank: int | None) -> tuple[Config, AbstractContextManager[Any]]:
    """Return the configuration with the folder that ``task`` works in, and that folder's lock, which the first rank
    takes. ``recipe`` is the file of the configuration. Print why and exit where the task may not begin; ``rank`` None:
    in a process that only looks."""
    from miles_spmd.controller import run_folder

    with failing(run_folder.RunFolderError, OSError, code=2):
        run_folder.check_recipe(config, recipe)
        config = run_folder.of_task(config, task)
        if rank is None:
            run_folder.check(config, task)
        elif rank:
            run_folder.check_results(config, task)
        lock = run_folder.claim(config, task) if rank == 0 else None
    return config, lock or nullcontext()


def load(
    recipe: Path,
    overrides: list[str],
    world_size: int | None,
    *,
    check_files: bool,
    task: str = "train",
    elsewhere: bool = False,
) -> Config:
    """Return the configuration of ``recipe``; print its errors and exit where it has some.

    With ``check_files`` what it names is examined for ``task``, too, by the first process alone; ``elsewhere``: for a
    run on another machine.
    """
    from miles_spmd.config.load import ConfigError, load_config

    inputs = None
    if check_files and EXAMINED not in os.environ and os.environ.get("RANK", "0") == "0":
        from miles_spmd.controller.inputs import errors

        inputs = partial(errors, task=task)
    with failing(ConfigError, code=2):
        return load_config(
            recipe,
            overrides,
            world_size=world_size,
            check_files=check_files,
            elsewhere=elsewhere,
            trains=task not in ENGINES_ALONE,
            inputs=inputs,
        )


def resolve(config: Config, capabilities: Collection[str] | None, *, quiet: bool = False) -> Config:
    """Return ``config`` with "auto" settings resolved for GPUs of these compute capabilities (None: unknown), and print
    the warnings about its settings; ``quiet``: none of the settings, which a user has set for another task."""
    from miles_spmd.config.checks import decide_parity, warnings

    config, reasons = decide_parity(config, capabilities)
    for warning in [] if quiet else warnings(config):
        warn(warning)
    if config.run.mode == "rl":  # other modes have no rollout that parity could concern
        for reason in reasons:
            warn(f"determinism.parity is off: {reason}")
    return config


def warn(message: str) -> None:
    """Print a warning, on the first rank only, and not again in the ranks of cells."""
    if os.environ.get("RANK", "0") == "0" and CELL not in os.environ:
        typer.echo(f"miles-spmd: warning: {printable(message, MAX_LINE)}", err=True)


def fail(message: str, code: int = 1) -> NoReturn:
    """Print an error, on the first rank only, and exit with ``code``."""
    from miles_spmd.protocol.last_words import say

    if os.environ.get("RANK", "0") == "0":
        say(f"error: {message}")
    sys.exit(code)


@contextmanager
def failing(*kinds: type[Exception], code: int = 1) -> Iterator[None]:
    """Errors of these kinds that are raised inside are printed, and end the process with ``code``."""
    try:
        yield
    except kinds as error:
        fail(str(error), code)
