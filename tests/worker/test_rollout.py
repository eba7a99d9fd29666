"""A rollout through sockets and ranks gives what the engine alone gives. Real engines, real gloo ranks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest
import torch
import torch.distributed as dist

from miles_spmd.config import DeadlinesConfig
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.cluster.errors import WorkerFailedError
from miles_spmd.controller.cluster.rollout_session import RolloutSession
from miles_spmd.generation.engine import Engine
from miles_spmd.protocol.commands import Command, Generate, RefitEngine
from miles_spmd.protocol.messages import Hello, OwnWork
from miles_spmd.protocol.pipe import Credentials
from miles_spmd.protocol.results import Ok, RefitResult, Result
from miles_spmd.protocol.router import Router
from miles_spmd.types.phase import Phase
from miles_spmd.types.request import Output, Request, SamplingParams
from miles_spmd.types.trajectory import FinishReason
from miles_spmd.worker.service import Service
from miles_spmd.worker.stopwatch import Stopwatch
from tests.controller.ranks import DIGEST, info_of
from tests.ranks import Ranks
from tests.service import EndingDealer, Unwatched

if TYPE_CHECKING:
    from miles_spmd.worker.worker import Worker


def make_engine(kind: str, folder: Path, engine_size: int) -> Any:
    """With weights that follow from their names, so that every engine has the same."""
    engine: Any
    if kind == "torch":
        from tests.reference_engine import TorchEngine

        engine = TorchEngine(folder, dtype="float32")
    else:
        from miles_spmd.generation.sglang.engine import SglangEngine

        engine = SglangEngine(folder, dtype="float32", server_args={"tp_size": engine_size})
    for number, (_, tensor) in enumerate(sorted(engine.weights().items())):
        generator = torch.Generator().manual_seed(number)
        tensor.copy_(torch.randn(tensor.shape, generator=generator).mul_(0.2))
    engine.commit(1)
    return engine


class EngineOnly:
    """A worker that has an engine and nothing else."""

    def __init__(self, engine: Engine) -> None:
        self.memory = self.turns = self  # type: ignore[assignment]
        self.engine, self.engine_rank, self.steps = engine, "", 0

    def execute(self, command: Command) -> Result:
        match command:
            case Generate():
                self.engine.flush()
            case RefitEngine(version):
                self.engine.commit(version)
                return RefitResult(version, 0, 0, 0)
        return Ok()

    def close_rollout(self, steps: int, seconds: float, retries: int) -> None:
        self.steps = steps

    def begin(self, phase: Phase, step: int) -> None: ...

    def explaining(self) -> AbstractContextManager[None]:
        return nullcontext()

    def take(self) -> dict[str, float]:
        return {}

    def take_own(self) -> OwnWork:
        return OwnWork(0.0, self.steps)


def serve(credentials: bytes, kind: str, folder: Path, engine_size: int) -> None:
    """A rank with an engine alone, until the controller is gone."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    engine: Engine = make_engine(kind, folder, engine_size)
    dealer = EndingDealer(
        msgspec.json.decode(credentials, type=list[Credentials])[rank], lambda: bool(dealer.disconnections.poll(0))
    )
    service = Service(cast("Worker", EngineOnly(engine)), rank, dealer, Unwatched(), Stopwatch())
    dealer.send(Hello(info_of(rank, world_size, engine_size), DIGEST))
    service.run()
    dealer.close()
    if kind == "sglang":
        engine.close()


@contextmanager
def serving(ranks: Ranks, *args: Any) -> Iterator[Cluster]:
    """Two ranks behind a Cluster."""
    router = Router(ranks=2)
    thread = threading.Thread(target=ranks.run, args=(2, serve, msgspec.json.encode(router.credentials), *args))
    thread.start()
    try:
        yield Cluster(router, 2, DeadlinesConfig(), DIGEST, Path("logs"))
    finally:
        router.close()
        thread.join()


def requests(count: int, new_tokens: int = 12) -> list[Request]:
    return [
        Request(f"{i}", [5 + i, 6, 7], SamplingParams(max_new_tokens=new_tokens, seed=100 + i, ignore_eos=True))
        for i in range(count)
    ]


def alone(engine: Engine, wanted: Sequence[Request]) -> dict[str, list[int]]:
    """One request after the other, on one engine, without any messages."""
    outputs: list[Output] = []
    for request in wanted:
        engine.submit([request])
        while not engine.idle:
            outputs += engine.step()
    return {o.rid: o.output_ids for o in outputs}


def test_two_engines_give_what_one_gives_alone(ranks: Ranks, checkpoint: Path) -> None:
    wanted = requests(5)

    def in_turns(session: RolloutSession) -> dict[str, list[int]]:
        found = {}
        session.submit(wanted[:3])
        for output in iter(session.next, None):
            if output.rid == "0":
                session.submit(wanted[3:])
            found[output.rid] = output.output_ids
        return found

    with serving(ranks, "torch", checkpoint, 1) as workers:
        for step in (0, 1):
            with workers.rollout(step) as session:
                found = in_turns(session)
            assert found == alone(make_engine("torch", checkpoint, 1), wanted)
            assert len(workers.seconds) == 2
            assert all(seconds["engine"] > 0 for seconds in workers.seconds)


def test_an_engine_of_two_ranks_stays_in_step(ranks: Ranks, checkpoint: Path) -> None:
    wanted = requests(4)
    with serving(ranks, "sglang", checkpoint, 2) as workers:
        with workers.rollout(0) as session:
            session.submit(wanted)
            found = {o.rid: o.output_ids for o in iter(session.next, None)}
        assert found.keys() == {"0", "1", "2", "3"}
        assert all(len(ids) == 12 for ids in found.values())
        with workers.rollout(1) as session:  # the same again, after the engine has slept between submissions
            for request in wanted:
                session.submit([request])
                assert [o.output_ids for o in iter(session.next, None)] == [found[request.rid]]


def test_aborted_requests_keep_what_they_have(ranks: Ranks, checkpoint: Path) -> None:
    with serving(ranks, "torch", checkpoint, 1) as workers, workers.rollout(0) as session:
        session.submit([*requests(2, new_tokens=120), *requests(4, new_tokens=2)[2:]])
        outputs = iter(session.next, None)
        assert {next(outputs).rid, next(outputs).rid} == {"2", "3"}
        session.abort(["0"])
        aborted = next(outputs)
        assert (aborted.rid, aborted.finish_reason) == ("0", FinishReason.ABORT)
        assert 2 <= len(aborted.output_ids) < 120
        session.abort()
        assert [o.finish_reason for o in outputs] == [FinishReason.ABORT]


def test_a_request_that_does_not_fit_ends_the_rollout(ranks: Ranks, checkpoint: Path) -> None:
    def rollout(workers: Cluster) -> None:
        with workers.rollout(0) as session:
            session.submit(requests(2, new_tokens=500))
            list(iter(session.next, None))

    error = r"rank \d .* rollout, step 0: ValueError: request 0:\d"
    with serving(ranks, "torch", checkpoint, 1) as workers, pytest.raises(WorkerFailedError, match=error):
        rollout(workers)


def test_weights_are_replaced_while_requests_run(ranks: Ranks, checkpoint: Path) -> None:
    """A refit waits for no response: the tokens of each are attributed to the weights that generated them."""
    with serving(ranks, "torch", checkpoint, 1) as workers, workers.rollout(0) as session:
        session.submit([*requests(2, new_tokens=120), *requests(4, new_tokens=2)[2:]])
        assert {session.next().rid, session.next().rid} == {"2", "3"}
        assert [result.version for result in workers.call(RefitEngine(2), step=0)] == [2, 2]
        for output in iter(session.next, None):
            versions = output.weight_versions
            assert [version for version, _ in versions] == [1, 2]
            assert sum(tokens for _, tokens in versions) == len(output.output_ids) == 120


def test_an_engine_of_two_ranks_takes_commands_between_its_steps(ranks: Ranks, checkpoint: Path) -> None:
    with serving(ranks, "sglang", checkpoint, 2) as workers, workers.rollout(0) as session:
        session.submit(requests(2, new_tokens=120))
        for version in (2, 3):
            assert [result.version for result in workers.call(RefitEngine(version), step=0)] == [version] * 2
        outputs = list(iter(session.next, None))
        assert [len(output.output_ids) for output in outputs] == [120, 120]
        assert all([version for version, _ in output.weight_versions][-1] == 3 for output in outputs)
