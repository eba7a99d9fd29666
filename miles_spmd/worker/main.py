"""What torchrun starts once per device: join the run, build the parts, execute the controller's commands."""

from __future__ import annotations

import faulthandler
import gc
import io
import os
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import msgspec

from miles_spmd.config import Config
from miles_spmd.config.load import config_digest
from miles_spmd.models.random import write_random_checkpoints
from miles_spmd.platform.determinism import pin_environment
from miles_spmd.protocol.commands import Stop
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.messages import Call, Failure, Hello, RankInfo, Reply
from miles_spmd.protocol.pipe import Credentials, Replay
from miles_spmd.protocol.results import Ok, Result
from miles_spmd.protocol.router import LOOPBACK
from miles_spmd.types.phase import Phase
from miles_spmd.worker.controller_process import ControllerProcess
from miles_spmd.worker.stopwatch import Stopwatch
from miles_spmd.worker.watchdog import Watchdog

if TYPE_CHECKING:
    from miles_spmd.worker.worker import Worker
    from miles_spmd.worker.world import Side

HOST = socket.gethostname()


@dataclass(frozen=True)
class Place:
    """The place that the launcher (torchrun, or srun through its script) assigns to this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master: str  # address of the first node, for all nodes

    @classmethod
    def from_environment(cls) -> Place:
        rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        return cls(rank, world_size, local_rank, local_world_size, os.environ["MASTER_ADDR"])


def main(config: Config, task: str = "train", replay: Replay | None = None) -> int:
    """Run one rank and return the exit status. ``task`` names what the controller's loop does, ``replay`` the steps
    that the tasks "replay" and "bisect" repeat."""
    place = Place.from_environment()
    try:
        write_random_checkpoints(config.model.checkpoints)  # before controller, trainer and engine read them
    except OSError as error:
        print(f"miles-spmd: {error.filename} cannot be written: {error.strerror}; set XDG_CACHE_HOME", file=sys.stderr)
        return 1
    controller = None
    if place.rank == 0:  # first, so that the two processes import in parallel
        host = LOOPBACK if place.local_world_size == place.world_size else place.master
        controller = ControllerProcess(config, task, host, place.world_size, replay)
    logs = config.run_dir / "logs"
    terminal = redirect_output(logs / f"rank-{place.rank}.log")
    watchdog = Watchdog(place.rank, terminal, logs / f"rank-{place.rank}.stacks", controller)
    watchdog.enter(Phase.START, 0, config.deadlines.start_timeout)
    watchdog.start()
    try:
        serve(config, task, place, controller, watchdog)
    except Exception as error:
        traceback.print_exc()
        watchdog.stop()
        problem = f"rank {place.rank} ({HOST}) ended: {type(error).__name__}: {error}"
        if controller is None:
            print(f"miles-spmd: {problem}", file=terminal, flush=True)
        else:
            controller.stop(problem)
        return 1
    return 0 if controller is None else controller.wait()


def serve(config: Config, task: str, place: Place, controller: ControllerProcess | None, watchdog: Watchdog) -> None:
    """Join the run, build the worker, and execute commands until Stop."""
    watch = Stopwatch()
    with watch("join"):
        credentials, side = join(config, place, controller)
    watchdog.connect(credentials, config.deadlines.heartbeat_timeout)
    dealer = Dealer(credentials, config.deadlines.heartbeat_timeout)
    try:
        worker = build(config, task, place, side, dealer, watch, watchdog)
    except Exception as error:
        dealer.send(Reply(0, place.rank, HOST, failure(error)))
        dealer.receive()  # block until the controller ends the run; it sends no further message
        return
    dealer.send(Hello(rank_info(worker, place), config_digest(config), watch.take(), worker.memory.take()))
    watchdog.enter(Phase.IDLE, 0)
    while not isinstance((call := next_call(dealer)).command, Stop):
        watchdog.enter(call.command.phase, call.step, call.deadline)
        worker.memory.begin(call.command.phase, call.step)
        result: Result | Failure
        try:
            with worker.memory.explaining():
                result = worker.execute(call.command)
        except Exception as error:
            result = failure(error)
        watchdog.enter(Phase.IDLE, call.step)
        dealer.send(Reply(call.id, place.rank, HOST, result, watch.take(), worker.memory.take()))
    # The watchdog stops before the last reply: from then on the controller may close its end at any time, which must
    # not count as its death. Its connection stays open until the reply is sent, or this process would count as dead.
    watchdog.stop()
    dealer.send(Reply(call.id, place.rank, HOST, Ok()))
    dealer.close()
    watchdog.disconnect()


def next_call(dealer: Dealer) -> Call:
    """Wait for the next command that has a reply. One without is part of a rollout that has failed on this rank while
    the controller was still sending to it."""
    while True:
        call = dealer.receive()
        if not isinstance(call, Call):
            raise RuntimeError(f"the controller sent a {type(call).__name__}")
        if call.command.has_reply():
            return call


def join(config: Config, place: Place, controller: ControllerProcess | None) -> tuple[Credentials, Side]:
    """Meet the other ranks through the launcher's store: set up torch.distributed, and exchange the credentials of the
    controller."""
    if config.determinism.deterministic:
        pin_environment()
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from miles_spmd.platform import cuda
    from miles_spmd.worker.world import take_side

    threads = max(1, len(os.sched_getaffinity(0)) // place.local_world_size)
    exact = config.determinism.deterministic or config.determinism.parity == "bitwise"
    torch.set_num_threads(1 if exact else threads)  # how a sum is split over threads decides its rounding
    start_timeout = timedelta(seconds=config.deadlines.start_timeout)
    store, _, _ = next(rendezvous("env://", timeout=start_timeout))
    control = dist.PrefixStore("control", store)
    if controller is not None:
        control.set("credentials", msgspec.json.encode(controller.credentials()).decode())
    credentials = msgspec.json.decode(control.get("credentials"), type=Credentials)
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
    if torch.cuda.is_available():
        # NCCL sets a group up in its first collective; a refit, which sends from rank to rank, is not one
        dist.all_reduce(torch.zeros(1, device="cuda"))
        torch.cuda.synchronize()
    return credentials, take_side(config.rollout.rollout_num_gpus, longest)


def build(
    config: Config, task: str, place: Place, side: Side, dealer: Dealer, watch: Stopwatch, watchdog: Watchdog
) -> Worker:
    """Build the worker. Raises MemoryPlanError, DeviceMemoryError, and whatever models and engine raise."""
    import torch

    from miles_spmd.platform import cpu, cuda

    generates = side.generates and config.generates(task)
    if generates and config.rollout.engine == "sglang" and torch.cuda.is_available():
        cuda.require_memory_saver()
    with watch("imports"):
        cpu.install()
        from miles_spmd.worker.memory_account import MemoryAccount
        from miles_spmd.worker.worker import Worker
    memory = MemoryAccount(config, place.world_size, side.trains, generates, watchdog.warn)
    memory.require_room(training=task == "train")
    with memory.explaining():
        worker = Worker(config, task, side, place.rank, dealer, watch, memory, watchdog.progress)
    gc.freeze()  # the backends keep millions of objects until the end: a collection that walks them takes a second
    return worker


def rank_info(worker: Worker, place: Place) -> RankInfo:
    versions = {name: version(name) for name in ("torch", "megatron-core", "sglang")}
    return RankInfo(place.rank, place.world_size, HOST, os.getpid(), worker.trainer_rank, worker.engine_rank, versions)


def failure(error: Exception) -> Failure:
    traceback.print_exc()
    return Failure(type(error).__name__, str(error), traceback.format_exc())


def redirect_output(log: Path) -> TextIO:
    """Send everything that this process prints, native libraries included, to ``log``. Returns the former stderr."""
    log.parent.mkdir(parents=True, exist_ok=True)
    terminal = os.fdopen(os.dup(2), "w")
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(descriptor, number)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    os.close(descriptor)
    faulthandler.enable()  # a crash in native code writes its stack to the log
    print(f"--- {time.strftime('%F %T')} {HOST} pid {os.getpid()}")
    return terminal
