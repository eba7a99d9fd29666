"""What torchrun starts once per device: join the run, build the parts, execute the controller's commands."""

from __future__ import annotations

import gc
import importlib
import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from miles_spmd.config import Config
from miles_spmd.config.load import config_digest
from miles_spmd.models.random import write_random_checkpoints
from miles_spmd.platform.determinism import pin_environment
from miles_spmd.protocol.commands import Stop
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.last_words import say
from miles_spmd.protocol.messages import Hello, RankInfo, Reply
from miles_spmd.protocol.pipe import Credentials, Replay
from miles_spmd.protocol.results import Ok
from miles_spmd.telemetry.environment import cores_per_rank
from miles_spmd.types.engine_group import SECOND_POLICY
from miles_spmd.types.phase import Phase
from miles_spmd.types.run_files import ENGINES_ALONE
from miles_spmd.worker.controller_process import ControllerProcess
from miles_spmd.worker.kernels import Kernels
from miles_spmd.worker.log import Log, redirect_output
from miles_spmd.worker.meeting import Place, is_standby, meet, wait_as_standby
from miles_spmd.worker.stopwatch import Stopwatch
from miles_spmd.worker.watchdog import Watchdog

if TYPE_CHECKING:
    from miles_spmd.worker.worker import Worker
    from miles_spmd.worker.world import Side

HOST = socket.gethostname()


@dataclass(frozen=True)
class Start:
    """What a rank has before it joins the run. ``controller`` is given on rank 0, whose child it is; ``watch`` has the
    times of the start's parts."""

    place: Place
    controller: ControllerProcess | None
    log: Log
    watchdog: Watchdog
    kernels: Kernels
    watch: Stopwatch


def main(config: Config, task: str = "train", replay: Replay | None = None) -> int:
    """Run one rank and return the exit status. ``task`` names what the controller's loop does, ``replay`` the steps
    that the tasks "replay" and "bisect" repeat."""
    place, began = Place.from_environment(), time.monotonic()
    try:
        write_random_checkpoints(config.checkpoints)  # before trainer and engine read them
    except OSError as error:
        say(f"start: {error}")
        return 1
    controller = None
    if place.rank == 0 and place.cell is None:  # first, so that the two processes import in parallel
        controller = ControllerProcess(config, task, place.host, place.world_size, replay)
    name = f"rank-{place.number}.{'standby' if is_standby(place) else 'starting'}.log"
    early = config.run_dir / "logs" / name  # until the attempt's folder is known
    try:
        terminal, log = redirect_output(early)
    except OSError as error:
        problem = f"rank {place.number} ({HOST}), start: the log cannot be written: {error}"
        if controller is None or controller.stop(problem):
            say(problem)
        return 1
    start = prepare(config, place, controller, terminal, log)
    try:
        if is_standby(place):
            import_all(config, place)
            wait_as_standby(place)
        start.watchdog.enter(Phase.START, 0, config.deadlines.start_timeout)
        status = serve(config, task, start)
    except BaseException as error:
        traceback.print_exc()
        start.watchdog.stop()
        problem = f"rank {place.number} ({HOST}) ended: {type(error).__name__}: {error}"
        if controller is None:
            say(problem, terminal)
        elif killed := controller.stop(problem):
            say(f"rank {place.number} ({HOST}), start: {killed}", terminal)
        return 1
    kernels = start.kernels
    if kernels.writes:
        kernels.fill(wait=True)
        for problem in kernels.problems:
            print(f"warning: {problem}")
    if controller is None:
        return status
    if task == "warm":
        counts = f"{kernels.compiled} kernels compiled, {kernels.found} files found"
        kept = f"kept in {kernels.archive}" if kernels.archive.exists() else "none to keep"
        print(f"warm: {time.monotonic() - began:.1f} s, {counts}, {'; '.join(kernels.problems) or kept}", file=terminal)
    if killed := controller.killed(status := controller.wait()):
        say(f"rank {place.number} ({HOST}), after the last step: {killed}", terminal)
    return status if status >= 0 else 1


def prepare(config: Config, place: Place, controller: ControllerProcess | None, terminal: TextIO, log: Log) -> Start:
    """Start the watchdog, and open the cache of compiled kernels for the libraries that are imported from now on."""
    first_node, stacks = place.rank < place.local_world_size, log.path.with_suffix(".stacks")
    watchdog = Watchdog(place.number, terminal, stacks, controller, beside_controller=first_node)
    watchdog.start()
    watch = Stopwatch()
    with watch("kernel_cache"):
        kernels = Kernels(config, place)
        kernels.open()
    for problem in kernels.problems:
        watchdog.warn(problem)
    if kernels.unpacked:
        print(f"{kernels.unpacked} files unpacked from {kernels.archive}")
    return Start(place, controller, log, watchdog, kernels, watch)


def import_all(config: Config, place: Place) -> None:
    """Import what a rank needs, in the order in which it does so itself."""
    if config.determinism.deterministic:
        pin_environment()
    import torch

    from miles_spmd.platform import cpu, cuda

    if torch.cuda.is_available():
        cuda.take_gpu(place.local_rank, place.local_world_size)
    cpu.install()
    importlib.import_module("miles_spmd.worker.worker")
    importlib.import_module("miles_spmd.training.cells.member")
    if config.rollout.engine == "sglang" and config.generates("train"):
        importlib.import_module("miles_spmd.generation.sglang.engine")


def serve(config: Config, task: str, start: Start) -> int:
    """Join the run, build the worker, and execute commands until Stop. Returns the exit status."""
    place, log, watchdog, watch = start.place, start.log, start.watchdog, start.watch
    with watch("join"):
        credentials, side = join(config, task, place, start.controller)
    from miles_spmd.worker.chores import Chores, gpu_monitor
    from miles_spmd.worker.service import Service, failure

    log.move(Path(credentials.logs) / f"rank-{place.number}.log")
    watchdog.connect(credentials, config.deadlines.heartbeat_timeout, log.path.with_suffix(".stacks"))
    dealer = Dealer(credentials, config.deadlines.heartbeat_timeout)
    try:
        worker = build(config, task, place, side, watch, watchdog.warn)
        if task in ("train", "eval", *ENGINES_ALONE):
            worker.describe()
        chores = Chores(log, start.kernels, gpu_monitor(place))
        service = Service(worker, place.number, dealer, watchdog, watch, chores, config.deadlines.engine_step_timeout)
        log.check()
    except BaseException as error:
        dealer.send(Reply(0, place.number, HOST, failure(error)))
        dealer.receive()  # block until the controller ends the run; it sends no further message
        return 1
    dealer.send(Hello(rank_info(worker, place), config_digest(config), watch.take(), worker.memory.take()))
    watchdog.enter(Phase.IDLE, 0)
    stop = service.run()
    assert isinstance(stop.command, Stop)
    # The watchdog stops before the last reply: from then on the controller may close its end at any time, which must
    # not count as its death. Its connection stays open until the reply is sent, or this process would count as dead.
    watchdog.stop()
    dealer.send(Reply(stop.id, place.number, HOST, Ok()))
    dealer.close()
    watchdog.disconnect()
    return stop.command.status


def join(config: Config, task: str, place: Place, controller: ControllerProcess | None) -> tuple[Credentials, Side]:
    """Meet the other ranks: set up torch.distributed, and get the credentials for the controller."""
    if config.determinism.deterministic:
        pin_environment()
    import torch
    import torch.distributed as dist

    from miles_spmd.platform import cuda
    from miles_spmd.platform.plain_objects import accept_plain_objects_only
    from miles_spmd.worker.world import take_side

    threads = cores_per_rank(place.ranks_here)
    exact = config.determinism.deterministic or config.determinism.parity == "bitwise"
    torch.set_num_threads(1 if exact else threads)  # how a sum is split over threads decides its rounding
    accept_plain_objects_only()
    store, credentials = meet(place, config.run_dir, controller, config.deadlines.start_timeout)
    # a collective may last as long as the phase around it
    longest = timedelta(seconds=max(config.deadlines.model_dump().values()))
    if torch.cuda.is_available():
        cuda.take_gpu(place.local_rank, place.local_world_size)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore("groups", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=longest,
    )
    others = config.reward.judge_num_gpus, config.second_policy.second_num_gpus
    return credentials, take_side(config.rollout.rollout_num_gpus, longest, *others, trains=task not in ENGINES_ALONE)


def build(config: Config, task: str, place: Place, side: Side, watch: Stopwatch, warn: Callable[[str], None]) -> Worker:
    """Build the worker. Raises MemoryPlanError, DeviceMemoryError, and whatever models and engine raise."""
    import torch
    import torch.distributed as dist

    from miles_spmd.platform import cpu, cuda

    ranks = place.world_size
    if side.group == SECOND_POLICY:
        config, ranks = config.of_policy(SECOND_POLICY), dist.get_world_size()
    generates = side.generates and config.generates(task)
    if generates and config.rollout.engine == "sglang" and torch.cuda.is_available():
        cuda.require_memory_saver()
    with watch("imports"):
        cpu.install()
        from miles_spmd.worker.memory_account import MemoryAccount
        from miles_spmd.worker.worker import Worker
    memory = MemoryAccount(config, ranks, side.trains, generates, warn, group=side.group)
    memory.require_room(training=task in ("train", "warm"))
    with memory.explaining():
        worker = Worker(config, task, side, place.number, watch, memory, place.cell)
    gc.freeze()  # the backends keep millions of objects until the end: a collection that walks them takes a second
    return worker


def rank_info(worker: Worker, place: Place) -> RankInfo:
    from miles_spmd.platform import cuda

    versions = {name: version(name) for name in ("torch", "megatron-core", "sglang")}
    duties = worker.trainer_rank, worker.engine_rank
    return RankInfo(place.number, place.ranks, HOST, os.getpid(), *duties, versions, cuda.name_gpu(), worker.group)
