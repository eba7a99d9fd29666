"""What torchrun starts once per device: join the run, build the parts, do what the controller says."""

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
from miles_spmd.protocol.credentials import Credentials
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.messages import Command, Failure, Feed, Hello, Ok, RankInfo, Reply, Stop
from miles_spmd.protocol.order import LAST_WORDS, Replay
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
    """What the launcher (torchrun, or srun through its script) says of this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master: str  # under which all nodes reach the first

    @classmethod
    def from_environment(cls) -> Place:
        world_size = int(os.environ["WORLD_SIZE"])
        return cls(
            rank=int(os.environ["RANK"]),
            world_size=world_size,
            local_rank=int(os.environ["LOCAL_RANK"]),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
            master=os.environ["MASTER_ADDR"],
        )


def main(config: Config, task: str = "train", replay: Replay | None = None) -> int:
    """Returns the exit status. ``task`` is what the controller's loop is to do, ``replay`` of which steps."""
    place = Place.from_environment()
    try:
        write_random_checkpoints(config.model.checkpoints)  # before controller, trainer and engine read them
    except OSError as error:
        print(f"miles-spmd: {error.filename} cannot be written: {error.strerror}; set XDG_CACHE_HOME", file=sys.stderr)
        return 1
    controller = None
    if place.rank == 0:  # first of all, so that it imports while we do
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
            controller.tell(problem)
            controller.wait(2 * LAST_WORDS)
        return 1
    return 0 if controller is None else controller.wait()


def serve(config: Config, task: str, place: Place, controller: ControllerProcess | None, watchdog: Watchdog) -> None:
    """Do what the controller says until it says stop."""
    watch = Stopwatch()
    with watch("join"):
        credentials, side = join(config, place, controller)
    watchdog.connect(credentials, config.deadlines.heartbeat_timeout)
    dealer = Dealer(credentials, config.deadlines.heartbeat_timeout)
    try:
        worker = build(config, task, place, side, dealer, watch, watchdog)
    except Exception as error:
        traceback.print_exc()
        dealer.send(Reply(0, place.rank, HOST, Phase.START, failure(error)))
        dealer.receive()  # nothing comes: the controller ends the run
        return
    dealer.send(Hello(rank_info(worker, place), config_digest(config), watch.take(), worker.ledger.take()))
    watchdog.enter(Phase.IDLE, 0, None)
    while not isinstance((command := next_command(dealer)).body, Stop):
        watchdog.enter(command.phase, command.step, command.deadline)
        worker.ledger.begin(command.phase, command.step)
        try:
            with worker.ledger.explaining():
                result = worker.do(command.body)
        except Exception as error:
            traceback.print_exc()
            result = failure(error)
        watchdog.enter(Phase.IDLE, command.step, None)
        memory = worker.ledger.take()
        dealer.send(Reply(command.id, place.rank, HOST, command.phase, result, watch.take(), memory))
    watchdog.stop()
    dealer.send(Reply(command.id, place.rank, HOST, command.phase, Ok()))
    dealer.close()
    watchdog.disconnect()


def next_command(dealer: Dealer) -> Command:
    """The next one that is not for a rollout; such a one comes when the rollout has failed here meanwhile."""
    while True:
        command = dealer.receive()
        if not isinstance(command, Command):
            raise RuntimeError(f"the controller sent a {type(command).__name__}")
        if not isinstance(command.body, Feed):
            return command


def join(config: Config, place: Place, controller: ControllerProcess | None) -> tuple[Credentials, Side]:
    """Meet the other ranks: torch.distributed's groups, and the way to the controller, through one store."""
    if config.determinism.deterministic:
        pin_environment()
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from miles_spmd.platform import cuda
    from miles_spmd.worker.world import take_side

    threads = max(1, len(os.sched_getaffinity(0)) // place.local_world_size)
    exact = config.determinism.deterministic or config.determinism.parity == "bitwise"
    torch.set_num_threads(1 if exact else threads)  # a sum depends on how it is shared out
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
        # NCCL meets in the first collective of a group, of which a refit is none: it sends from rank to rank
        dist.all_reduce(torch.zeros(1, device="cuda"))
        torch.cuda.synchronize()
    return credentials, take_side(config.rollout.rollout_num_gpus, longest)


def build(
    config: Config, task: str, place: Place, side: Side, dealer: Dealer, watch: Stopwatch, watchdog: Watchdog
) -> Worker:
    import torch

    from miles_spmd.platform import cpu, cuda

    generates = side.generates and config.generates(task)
    if generates and config.rollout.engine == "sglang" and torch.cuda.is_available():
        cuda.require_memory_saver()
    with watch("imports"):
        cpu.install()
        from miles_spmd.worker.memory_account import MemoryAccount
        from miles_spmd.worker.worker import Worker
    ledger = MemoryAccount(config, place.world_size, side.trains, generates)
    ledger.require_room(training=task == "train")
    with ledger.explaining():
        worker = Worker(config, task, side, place.rank, dealer, watch, ledger, watchdog.progress)
    gc.freeze()  # the backends hold millions of objects for good: a collection that walks them takes a second
    return worker


def rank_info(worker: Worker, place: Place) -> RankInfo:
    return RankInfo(
        rank=place.rank,
        world_size=place.world_size,
        host=HOST,
        pid=os.getpid(),
        trainer=worker.trainer_rank,
        engine=worker.engine_rank,
        versions={name: version(name) for name in ("torch", "megatron-core", "sglang")},
    )


def failure(error: Exception) -> Failure:
    return Failure(type(error).__name__, str(error), traceback.format_exc())


def redirect_output(log: Path) -> TextIO:
    """Send what this process and its libraries print, in any language, to ``log``. Returns the stderr it had."""
    log.parent.mkdir(parents=True, exist_ok=True)
    terminal = os.fdopen(os.dup(2), "w")
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(descriptor, number)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    os.close(descriptor)
    faulthandler.enable()  # a crash in native code leaves its stack in the log
    print(f"--- {time.strftime('%F %T')} {HOST} pid {os.getpid()}")
    return terminal
