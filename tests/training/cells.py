"""Cells for tests: processes with a world of their own for each cell, joined by torchft's lighthouse. The test does
what a controller does: it lets cells meet, gives them their parts of a batch, and sees what became of them."""

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

from miles_spmd.config import Config
from miles_spmd.protocol.results import MeetResult
from miles_spmd.training.cells import live_state
from miles_spmd.training.cells.exchange import Exchange
from miles_spmd.training.cells.live_state import LiveState
from miles_spmd.training.reduction import PartSum
from miles_spmd.training.roles import Roles
from miles_spmd.training.trainer import Trainer
from miles_spmd.types import cell as of_types
from miles_spmd.types.role import Role
from miles_spmd.types.train_sequence import MicroBatch, TrainSequence
from tests import forked

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


def digests(roles: Roles) -> Digests:
    """Return digests of all weights, main parameters, moments and snapshots, by name or number."""
    found, trainers = dict[str, int](), list(roles._trainers.values())
    for trainer in trainers:
        weights = {name: weight.view(torch.uint8).numpy() for name, weight in trainer.weights().items()}
        found |= {f"{len(found)} {name}": xxhash.xxh3_64_intdigest(w.tobytes()) for name, w in weights.items()}
    state = LiveState([trainer.checkpoint for trainer in trainers], roles.changing_snapshots).tensors()
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

        roles = Roles(run, of_types.Cell(cell, parts, lighthouse))
        pipe.send("built")
        while True:
            function, args = pipe.recv()
            pipe.send(function(roles, *args))
    except EOFError:
        os._exit(0)
    except BaseException:
        with contextlib.suppress(OSError):
            pipe.send(("error", traceback.format_exc()))
        sys.stderr.flush()
        os._exit(1)


def meet(roles: Roles, founds: bool = False) -> MeetResult:
    return roles.in_cell.meet(founds=founds)


def compute(roles: Roles, number: int, batch: list[TrainSequence], own: list[int], leaves: int, role: Role) -> Any:
    """Compute the parts ``own`` of an update; those that are kept are not computed again."""
    trainer = roles.in_cell.trainer(role)
    each = leaves // trainer.parts
    for part in own:
        if trainer.kept(number, part) is None:
            trainer.compute_part(number, part, own_leaves(batch, trainer, leaves, part * each, each))


def keeps(roles: Roles, role: Role = Role.ACTOR) -> list[int]:
    """Return the parts whose gradients are in memory."""
    return sorted(roles.in_cell.trainer(role)._total.kept)


def update(
    roles: Roles, number: int, batch: list[TrainSequence], own: list[int], leaves: int, role: Role = Role.ACTOR
) -> Any:
    """Compute the parts ``own``, and make the update."""
    compute(roles, number, batch, own, leaves, role)
    result = roles.in_cell.make_update(role, number)
    if result.lost:
        return "lost", result.lost, result.missing
    return "made", number, result.grad_norm, digests(roles)


def die(roles: Roles, moment: str, how: int = signal.SIGKILL) -> None:
    """Let this rank end by a signal at a ``moment`` of its next update."""

    member = roles.in_cell

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
            before(member.link._manager(), "start_quorum")
        case "backward":  # when the first leaf is done
            before(PartSum, "__call__", calls=2)
        case "exchange":
            before(Exchange, "_exchange")
        case "vote":
            before(member.link._manager(), "should_commit")
        case "commit":  # decided, not made
            before(member.trainer(Role.ACTOR), "_update")
        case _:
            raise ValueError(moment)


def damage_what_it_sends(roles: Roles) -> None:
    """Let the digest of the first tensor that the first rank sends to another cell be wrong."""
    if dist.get_rank():
        return
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
    """``parts`` cells of ``size`` ranks; ``founders`` of them, by default all, are there from the beginning."""

    def __init__(self, run: Config, parts: int, size: int, folder: Path, founders: int | None = None) -> None:
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
        for number in range(parts if founders is None else founders):
            self.start(number)
        self.ready()
        for met in self.call(dict.fromkeys(self.live, (meet, (True,)))).values():
            assert all(each == MeetResult(0) for each in met)

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
                assert pipe.recv() == "built"

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
            for one in ready:
                if one not in waiting:
                    continue
                number, rank = waiting.pop(one)  # type: ignore[index]
                try:
                    answer = one.recv()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    self.lose(number)
                    waiting = {other: place for other, place in waiting.items() if place[0] != number}
                    continue
                assert not (isinstance(answer, tuple) and answer[0] == "error"), answer[1]
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

    def join(self, number: int) -> list[MeetResult]:
        """Let a cell meet the others, and return what its ranks say."""
        self.begin(number, meet)
        return self.met(number)

    def met(self, number: int) -> list[Any]:
        """Let the others meet until they have met this cell, which has begun to; return the answers of its ranks. They
        meet without it where it asks later than they do."""
        while (found := self.answers(number, 0.5)) is None:
            self.call({other: (meet, ()) for other in self.live if other != number})
        return found

    def lose(self, number: int) -> None:
        self.live.pop(number).kill()

    def close(self) -> None:
        for number in [*self.live]:
            self.lose(number)
        self._lighthouse.shutdown()


@contextlib.contextmanager
def cells(run: Config, parts: int, size: int, folder: Path, founders: int | None = None) -> Iterator[Cells]:
    running = Cells(run, parts, size, folder, founders)
    try:
        yield running
    finally:
        running.close()
