"""What torchrun starts once per device: join the run, build the parts, execute the controller's commands."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import itertools
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from miles_spmd.config import Config
from miles_spmd.config.load import config_digest
from miles_spmd.models.random import write_random_checkpoints
from miles_spmd.platform.determinism import pin_environment
from miles_spmd.platform.gpu_health import GpuMonitor
from miles_spmd.platform.kernel_cache import KernelCache, shared_folder
from miles_spmd.protocol.commands import Stop
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.last_words import say
from miles_spmd.protocol.messages import Hello, RankInfo, Reply
from miles_spmd.protocol.pipe import Credentials, Replay
from miles_spmd.protocol.results import Ok
from miles_spmd.telemetry.environment import cores_per_rank, gpus, processor
from miles_spmd.types.phase import Phase
from miles_spmd.types.secrets import scrubbed
from miles_spmd.worker.controller_process import ControllerProcess
from miles_spmd.worker.meeting import Place, meet
from miles_spmd.worker.stopwatch import Stopwatch
from miles_spmd.worker.watchdog import Watchdog

if TYPE_CHECKING:
    from miles_spmd.worker.worker import Worker
    from miles_spmd.worker.world import Side

HOST = socket.gethostname()
COMPILED = 3  # in this step of a run nothing is left to compile: the first one is followed by a refit for the second


def main(config: Config, task: str = "train", replay: Replay | None = None) -> int:
    """Run one rank and return the exit status. ``task`` names what the controller's loop does, ``replay`` the steps
    that the tasks "replay" and "bisect" repeat."""
    place, began = Place.from_environment(), time.monotonic()
    try:
        write_random_checkpoints(config.model.checkpoints)  # before controller, trainer and engine read them
    except OSError as error:
        say(f"{error.filename} cannot be written: {error.strerror}; set XDG_CACHE_HOME")
        return 1
    controller = None
    if place.rank == 0:  # first, so that the two processes import in parallel
        controller = ControllerProcess(config, task, place.host, place.world_size, replay)
    early = config.run_dir / "logs" / f"rank-{place.rank}.starting.log"  # until the attempt's folder is known
    try:
        terminal, log = redirect_output(early)
    except OSError as error:
        problem = f"rank {place.rank} ({HOST}), start: the log cannot be written: {error}"
        if controller is None or controller.stop(problem):
            say(problem)
        return 1
    first_node = place.rank < place.local_world_size
    stacks = early.with_suffix(".stacks")
    watchdog = Watchdog(place.rank, terminal, stacks, controller, beside_controller=first_node)
    watchdog.enter(Phase.START, 0, config.deadlines.start_timeout)
    watchdog.start()
    watch = Stopwatch()
    with watch("kernel_cache"):
        cache = open_cache(config, place)
    for problem in cache.problems:
        watchdog.warn(problem)
    if cache.unpacked:
        print(f"{cache.unpacked} files unpacked from {cache.archive}")
    try:
        status = serve(config, task, place, controller, watchdog, log, cache, watch)
    except BaseException as error:
        traceback.print_exc()
        watchdog.stop()
        problem = f"rank {place.rank} ({HOST}) ended: {type(error).__name__}: {error}"
        if controller is None:
            say(problem, terminal)
        elif killed := controller.stop(problem):
            say(f"rank {place.rank} ({HOST}), start: {killed}", terminal)
        return 1
    if writes(config, place, cache):
        cache.fill(wait=True)
        for problem in cache.problems:
            print(f"warning: {problem}")
    if controller is None:
        return status
    if task == "warm":
        counts = f"{cache.compiled} kernels compiled, {cache.found} files found"
        kept = f"kept in {cache.archive}" if cache.archive.exists() else "none to keep"
        print(f"warm: {time.monotonic() - began:.1f} s, {counts}, {'; '.join(cache.problems) or kept}", file=terminal)
    if killed := controller.killed(status := controller.wait()):
        say(f"rank {place.rank} ({HOST}), after the last step: {killed}", terminal)
    return status if status >= 0 else 1


def open_cache(config: Config, place: Place) -> KernelCache:
    """Return the node's cache of compiled kernels, ready for the libraries that are imported from now on."""
    device = ", ".join(sorted({f"{gpu.name} {gpu.capability}" for gpu in gpus()})) or processor()
    generating = config.rollout.rollout_num_gpus
    side = "" if not generating else "engines" if place.rank >= place.world_size - generating else "trainers"
    cache = KernelCache(config.run.kernel_cache or shared_folder(), device, side)
    cache.open()
    return cache


def writes(config: Config, place: Place, cache: KernelCache) -> bool:
    """Return whether this rank writes the shared copy: the first one of a side, and of a node whose devices are others
    than the first one's."""
    first = place.rank in (0, place.world_size - config.rollout.rollout_num_gpus)
    return first or (place.local_rank == 0 and not cache.archive.exists())


def serve(
    config: Config,
    task: str,
    place: Place,
    controller: ControllerProcess | None,
    watchdog: Watchdog,
    log: Log,
    cache: KernelCache,
    watch: Stopwatch,
) -> int:
    """Join the run, build the worker, and execute commands until Stop. Returns the exit status."""
    with watch("join"):
        credentials, side = join(config, place, controller)
    from miles_spmd.worker.service import Service, failure

    log.move(Path(credentials.logs) / f"rank-{place.rank}.log")
    watchdog.connect(credentials, config.deadlines.heartbeat_timeout, log.path.with_suffix(".stacks"))
    dealer = Dealer(credentials, config.deadlines.heartbeat_timeout)
    try:
        worker = build(config, task, place, side, watch, watchdog.warn)
        if task in ("train", "eval"):
            worker.describe()
        monitor, steps = gpu_monitor(place), itertools.count(1)

        def begin_step() -> None:
            if monitor:
                monitor.ask()
            if next(steps) == COMPILED and writes(config, place, cache):
                cache.fill()

        health = monitor.take if monitor else list
        service = Service(worker, place.rank, dealer, watchdog, watch, log.check, begin_step, health)
        log.check()
    except BaseException as error:
        dealer.send(Reply(0, place.rank, HOST, failure(error)))
        dealer.receive()  # block until the controller ends the run; it sends no further message
        return 1
    dealer.send(Hello(rank_info(worker, place), config_digest(config), watch.take(), worker.memory.take()))
    watchdog.enter(Phase.IDLE, 0)
    stop = service.run()
    assert isinstance(stop.command, Stop)
    # The watchdog stops before the last reply: from then on the controller may close its end at any time, which must
    # not count as its death. Its connection stays open until the reply is sent, or this process would count as dead.
    watchdog.stop()
    dealer.send(Reply(stop.id, place.rank, HOST, Ok()))
    dealer.close()
    watchdog.disconnect()
    return stop.command.status


def join(config: Config, place: Place, controller: ControllerProcess | None) -> tuple[Credentials, Side]:
    """Meet the other ranks: set up torch.distributed, and get the credentials for the controller."""
    if config.determinism.deterministic:
        pin_environment()
    import torch
    import torch.distributed as dist

    from miles_spmd.platform import cuda
    from miles_spmd.platform.plain_objects import accept_plain_objects_only
    from miles_spmd.worker.world import take_side

    threads = cores_per_rank(place.local_world_size)
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
    if torch.cuda.is_available():
        # NCCL sets a group up in its first collective; a refit, which sends from rank to rank, is not one
        dist.all_reduce(torch.zeros(1, device="cuda"))
        torch.cuda.synchronize()
    return credentials, take_side(config.rollout.rollout_num_gpus, longest)


def build(config: Config, task: str, place: Place, side: Side, watch: Stopwatch, warn: Callable[[str], None]) -> Worker:
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
    memory = MemoryAccount(config, place.world_size, side.trains, generates, warn)
    memory.require_room(training=task in ("train", "warm"))
    with memory.explaining():
        worker = Worker(config, task, side, place.rank, watch, memory)
    gc.freeze()  # the backends keep millions of objects until the end: a collection that walks them takes a second
    return worker


def rank_info(worker: Worker, place: Place) -> RankInfo:
    from miles_spmd.platform import cuda

    versions = {name: version(name) for name in ("torch", "megatron-core", "sglang")}
    duties = worker.trainer_rank, worker.engine_rank
    return RankInfo(place.rank, place.world_size, HOST, os.getpid(), *duties, versions, cuda.name_gpu())


def gpu_monitor(place: Place) -> GpuMonitor | None:
    """Start to watch the GPUs of this host, on its first rank."""
    import torch

    if place.local_rank or not torch.cuda.is_available():
        return None
    uuids = [f"GPU-{torch.cuda.get_device_properties(number).uuid}" for number in range(place.local_world_size)]
    monitor = GpuMonitor(uuids)
    monitor.start()
    return monitor


class Log(io.FileIO):
    """The file that a rank prints into. Where it cannot be written, whatever prints goes on, and :meth:`check` raises
    the error at the end of the command: else it would be raised by any line of any library, even while another error is
    being reported."""

    path: Path
    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            self.error = OSError(error.errno, error.strerror, str(self.path))
            return len(data)

    def move(self, path: Path) -> None:
        """Go on as ``path``. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):  # the controller, which ends the run, has collected it
            self.path.rename(path)
        self.path = path

    def check(self) -> None:
        if self.error is not None:
            raise self.error


def redirect_output(path: Path) -> tuple[TextIO, Log]:
    """Send everything that this process prints, native libraries included, to ``path``. Returns the former stderr, and
    the log. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = Log(path, "a")
    log.path = path
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = scrubbed(os.fdopen(os.dup(2), "w"))
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    lines = io.TextIOWrapper(io.BufferedWriter(log), errors="backslashreplace", line_buffering=True)
    sys.stdout = sys.stderr = scrubbed(lines)
    faulthandler.enable()  # a crash in native code writes its stack to the log
    print(f"--- {time.strftime('%F %T')} {HOST} pid {os.getpid()}")
    log.check()
    return terminal, log
