"""Cells for tests: processes with a world of their own for each cell, joined by torchft's lighthouse. The test does
what a controller does: it gives cells their parts of a batch, and sees what became of them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torchft.coordination import LighthouseServer

from miles_spmd.algorithms.losses import make_loss
from miles_spmd.config import Config
from miles_spmd.models import load_family
from miles_spmd.training.cells import live_state
from miles_spmd.training.cells.link import CellLink, Exchange, Limits, LostUpdateError
from miles_spmd.training.cells.live_state import LiveState
from miles_spmd.training.cells.trainer import CellTrainer
from miles_spmd.training.reduction import PartSum
from miles_spmd.training.trainer import Trainer
from miles_spmd.types.train_sequence import MicroBatch, TrainSequence
from tests import forked

LIMITS = Limits(exchange=20.0, quorum=20.0, connect=10.0)
JOIN_SECONDS = 3.0  # that the lighthouse waits for a cell which is alive and has not asked yet
DEAD_SECONDS = 1.0  # without a sign of life

Digests = dict[str, int]  # of tensors, by name


def leaf(batch: list[TrainSequence], number: int, leaves: int) -> list[MicroBatch]:
    """Return the micro-batches of one leaf, of one sequence each."""
    size = len(batch) // leaves
    return [[sequence] for sequence in batch[number * size : (number + 1) * size]]


def own_leaves(batch: list[TrainSequence], trainer: Trainer, leaves: int, first: int, count: int) -> list[MicroBatch]:
    """Return this data-parallel rank's micro-batches of the ``count`` leaves from ``first`` on."""
    each = count // trainer.where.dp_size
    start = first + trainer.where.dp_rank * each
    return [batch_of for number in range(start, start + each) for batch_of in leaf(batch, number, leaves)]


def digests(trainer: Trainer) -> Digests:
    """Return digests of weights, main parameters and moments, by name and number."""
    weights = {name: weight.view(torch.uint8).numpy() for name, weight in trainer.weights().items()}
    found = {name: xxhash.xxh3_64_intdigest(weight.tobytes()) for name, weight in weights.items()}
    state = LiveState(trainer.checkpoint).tensors()
    return found | {f"state.{n}": xxhash.xxh3_64_intdigest(each.numpy().tobytes()) for n, each in enumerate(state)}


# --- in the ranks ----------------------------------------------------------------------------------------------------


def _serve(
    cell: int, rank: int, size: int, meeting: str, pipe: Connection, lighthouse: str, parts: int, run: Config
) -> None:
    os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    from miles_spmd.platform import cpu

    cpu.install()
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=size)

        def join(state: LiveState) -> CellLink:
            return CellLink(cell, parts, lighthouse, state, limits=LIMITS)

        family = load_family(run.model.hf_checkpoint)
        trainer = CellTrainer(run, family, make_loss(run.run.mode, run.algorithm), parts=parts, join=join)
        pipe.send(("built", trainer.link.updates))
        while True:
            function, args = pipe.recv()
            try:
                pipe.send(function(trainer, *args))
            except LostUpdateError as error:
                pipe.send(("lost", str(error), error.missing))
    except EOFError:
        os._exit(0)
    except BaseException:
        with contextlib.suppress(OSError):
            pipe.send(("error", traceback.format_exc()))
        sys.stderr.flush()
        os._exit(1)


def update(trainer: CellTrainer, batches: list[list[TrainSequence]], own: list[int], leaves: int, parts: int) -> Any:
    """Make the next update with the parts ``own``; ``batches`` are those of all updates."""
    number = trainer.agree()
    each = leaves // parts
    work = {part: own_leaves(batches[number], trainer, leaves, part * each, each) for part in own}
    result, of_parts = trainer.train_parts(work)
    return "made", number, result.grad_norm, digests(trainer), sorted(of_parts)


def die(trainer: CellTrainer, moment: str, how: int = signal.SIGKILL) -> None:
    """Let this rank end by a signal at a ``moment`` of its next update."""

    def strike(*_: Any) -> None:
        os.kill(os.getpid(), how)

    def before(owner: Any, name: str, calls: int = 1) -> None:
        function, left = getattr(owner, name), [calls]

        def struck(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                strike()
            return function(*args, **kwargs)

        setattr(owner, name, struck)

    match moment:
        case "agree":
            before(trainer.link._manager, "start_quorum")
        case "backward":  # when the first leaf is done
            before(PartSum, "__call__", calls=2)
        case "exchange":
            before(Exchange, "_gather", calls=2)
        case "vote":
            before(trainer.link._manager, "should_commit")
        case "commit":  # decided, not made
            before(trainer, "_update")
        case _:
            raise ValueError(moment)


def damage_what_it_sends(trainer: CellTrainer) -> None:
    """Let the digest of the first tensor that this rank sends to another cell be wrong."""
    honest = live_state.digest

    def digest(tensor: torch.Tensor) -> int:
        live_state.digest = honest
        return honest(tensor) ^ 1

    live_state.digest = digest


# --- in the test -----------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    number: int
    ranks: list[tuple[Any, Connection]] = field(default_factory=list)

    def kill(self) -> None:
        """As a launcher does with the rest of a cell of which a rank has died."""
        for process, pipe in self.ranks:
            pipe.close()
            process.kill()
            process.join()


class Cells:
    """``parts`` cells of ``size`` ranks."""

    def __init__(self, run: Config, parts: int, size: int, folder: Path) -> None:
        self._run, self.parts, self.size, self._folder = run, parts, size, folder
        self._lighthouse = LighthouseServer(
            bind="127.0.0.1:0",
            min_replicas=1,
            join_timeout_ms=int(JOIN_SECONDS * 1000),
            quorum_tick_ms=20,
            heartbeat_timeout_ms=int(DEAD_SECONDS * 1000),
        )
        port = self._lighthouse.address().rsplit(":", 1)[1]
        self._address = f"http://127.0.0.1:{port}"
        self._starts = 0
        self.live: dict[int, Cell] = {}
        for number in range(parts):
            self.start(number)
        self.ready()

    def start(self, number: int) -> None:
        self._starts += 1
        cell = self.live[number] = Cell(number)
        for rank in range(self.size):
            here, there = forked.server.Pipe()
            meeting = str(self._folder / f"meeting-{self._starts}")
            args = (number, rank, self.size, meeting, there, self._address, self.parts, self._run)
            process = forked.server.Process(target=_serve, args=args, daemon=True)
            process.start()
            there.close()
            cell.ranks.append((process, here))

    def ready(self, *numbers: int) -> None:
        for number in numbers or self.live:
            for _, pipe in self.live[number].ranks:
                assert pipe.poll(60)
                assert pipe.recv()[0] == "built"

    def call(self, work: Mapping[int, tuple[Callable[..., Any], tuple[Any, ...]]]) -> dict[int, list[Any]]:
        """Let each cell do its work; return the answers of its ranks. A cell that dies meanwhile is killed as a whole
        and has none."""
        for number, order in work.items():
            for _, pipe in self.live[number].ranks:
                pipe.send(order)
        waiting = {pipe: (number, rank) for number in work for rank, (_, pipe) in enumerate(self.live[number].ranks)}
        answers: dict[int, dict[int, Any]] = {number: {} for number in work}
        while waiting:
            ready = wait([*waiting], 90)
            assert ready, f"no answer from (cell, rank) {[*waiting.values()]}"
            for pipe in ready:
                if pipe not in waiting:
                    continue
                number, rank = waiting.pop(pipe)  # type: ignore[index]
                try:
                    answer = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    self.lose(number)
                    waiting = {other: place for other, place in waiting.items() if place[0] != number}
                    continue
                assert answer is None or answer[0] != "error", answer[1]
                answers[number][rank] = answer
        return {
            number: [of_ranks[rank] for rank in sorted(of_ranks)]
            for number, of_ranks in answers.items()
            if number in self.live
        }

    def begin(self, number: int, function: Callable[..., Any], *args: Any) -> None:
        """Let a cell do something, whose :meth:`answers` are taken later."""
        for _, pipe in self.live[number].ranks:
            pipe.send((function, args))

    def answers(self, number: int, seconds: float) -> list[Any] | None:
        """Return the answers of a cell's ranks, None if the first one has not come after so many ``seconds``."""
        pipes = [pipe for _, pipe in self.live[number].ranks]
        if not pipes[0].poll(seconds):
            return None
        assert all(pipe.poll(60) for pipe in pipes)
        return [pipe.recv() for pipe in pipes]

    def lose(self, number: int) -> None:
        self.live.pop(number).kill()

    def close(self) -> None:
        for number in [*self.live]:
            self.lose(number)
        self._lighthouse.shutdown()


@contextlib.contextmanager
def cells(run: Config, parts: int, size: int, folder: Path) -> Iterator[Cells]:
    running = Cells(run, parts, size, folder)
    try:
        yield running
    finally:
        running.close()
