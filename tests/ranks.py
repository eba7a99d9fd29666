"""Real ranks for tests, on gloo, and on NCCL where there are GPUs: processes that stay up, because importing Megatron
and SGLang costs more than most tests.

``ranks.run(world_size, function, *args)`` calls the module-level ``function(*args)`` on that many ranks with
torch.distributed initialised, and returns the results by rank. An exception on any rank fails the test with that rank's
traceback; a rank that does not answer in time fails it too, and both replace the processes before the next test.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest

from miles_spmd.telemetry.environment import gpus
from tests import forked

GPUS = bool(gpus())
MANY_THREADS = 150  # a Megatron rank's groups have seventy; those that something still refers to busy the machine

_context = multiprocessing.get_context("spawn") if GPUS else forked.server


def free_port() -> int:
    """For a launcher that requires one. Below the range from which the system gives ports to connections and to those
    who ask for any: otherwise, one of the many processes of the tests could get it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port


def _serve(rank: int, pipe: Connection) -> None:
    os.environ.update(OMP_NUM_THREADS="1", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    from miles_spmd.platform import cpu

    cpu.install()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            world_size, meeting, function, args = pipe.recv()
        except EOFError:
            return
        try:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
            if torch.cuda.is_available():
                torch.cuda.set_device(rank)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, f"file://{meeting}", rank=rank, world_size=world_size)
            answer: tuple[bool, Any] = (True, function(*args))
            dist.barrier()
            _leave()
        except BaseException:  # the processes will be replaced: leaving could wait for ranks that wait for this one
            answer = (False, traceback.format_exc())
        pipe.send(answer)


def _leave() -> None:
    """Give up all process groups with their threads, which outlive their destruction where something refers to them."""
    import torch.distributed as dist

    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()
    gc.freeze()  # what is left is mostly the backends' own: not to be walked again by every collection


class Ranks:
    def __init__(self) -> None:
        self._live: list[tuple[Any, Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")  # a file to meet at, where a port could be taken
        self._meetings = itertools.count()

    def _ensure(self, count: int) -> None:
        if GPUS and len(self._live) != count:
            self.stop()  # ranks that set up symmetric memory have to have done so equally often
        while len(self._live) < count:
            here, there = _context.Pipe()
            process = _context.Process(target=_serve, args=(len(self._live), there), daemon=True)
            process.start()
            there.close()
            self._live.append((process, here))

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
        self._ensure(world_size)
        meeting = f"{self._folder.name}/{next(self._meetings)}"
        pipes = [pipe for _, pipe in self._live[:world_size]]
        for pipe in pipes:
            pipe.send((world_size, meeting, function, args))
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(answers) + len(failures) < world_size:
            waiting = [p for i, p in enumerate(pipes) if i not in answers and i not in failures]
            ready = wait(waiting, timeout if not failures else 10)  # after a failure the others hang in a collective
            if not ready:
                break
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    good, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    good, value = False, "the process died"
                (answers if good else failures)[rank] = value
        tired = any(len(os.listdir(f"/proc/{process.pid}/task")) > MANY_THREADS for process, _ in self._live)
        if len(answers) < world_size or tired:
            self.stop()
        if len(answers) < world_size:
            silent = [r for r in range(world_size) if r not in answers and r not in failures]
            text = "\n".join(f"rank {r}:\n{t}" for r, t in failures.items())
            pytest.fail(f"{text}\nranks without an answer: {silent}")
        return [answers[r] for r in range(world_size)]

    def stop(self) -> None:
        for process, pipe in self._live:
            pipe.close()
            process.kill()
            process.join()
        self._live.clear()
