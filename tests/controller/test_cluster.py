"""What the controller makes of its ranks: results in order, and one clear error for everything that goes wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from miles_spmd.config import DeadlinesConfig
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.cluster.listener import (
    DeadlineError,
    ProtocolError,
    WorkerFailedError,
    WorkerLostError,
    WorkerSilentError,
    WorkerStoppedError,
)
from miles_spmd.protocol.commands import AbortRequests, EndGenerate, Generate, RefitEngine, Stop, Submit, TrainStep
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.messages import Call, Completions, Failure, Heartbeat, Reply
from miles_spmd.protocol.results import Ok, RefitResult, Result, TrainResult
from miles_spmd.protocol.router import Router
from miles_spmd.types.phase import Phase
from miles_spmd.types.request import Output, Request, SamplingParams
from miles_spmd.types.sample import FinishReason
from miles_spmd.types.train_sequence import TrainSequence
from tests.controller.ranks import DIGEST, HOST, FakeRank, empty


class Harness:
    """A router, its workers, and fake ranks."""

    def __init__(self, world_size: int, **deadlines: float) -> None:
        self.world_size = world_size
        self.router = Router(ranks=world_size)
        self.workers = Cluster(self.router, world_size, DeadlinesConfig(**deadlines), DIGEST, Path("runs/x/logs"))
        self.ranks: list[FakeRank] = []

    def add(self, rank: int, *args: Any, **settings: Any) -> FakeRank:
        self.ranks.append(
            FakeRank(self.router.credentials[min(rank, self.world_size - 1)], rank, self.world_size, *args, **settings)
        )
        return self.ranks[-1]

    def add_all(self, *args: Any, **settings: Any) -> Cluster:
        for rank in range(self.world_size):
            self.add(rank, *args, **settings)
        self.workers.wait_ready()
        return self.workers

    def close(self) -> None:
        for rank in self.ranks:
            rank.leave()
        self.router.close()


@pytest.fixture
def cluster() -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def make(world_size: int = 2, **deadlines: float) -> Harness:
        made.append(Harness(world_size, **deadlines))
        return made[-1]

    yield make
    for one in made:
        one.close()


Make = Callable[..., Harness]


# --- start -----------------------------------------------------------------------------------------------------------


def test_infos_come_by_rank(cluster: Make) -> None:
    c = cluster(3)
    for rank in (2, 0, 1):
        c.add(rank)
    assert [info.rank for info in c.workers.infos] == [0, 1, 2]
    assert c.workers.seconds == [{"imports": 1.5}] * 3


def test_a_rank_with_another_configuration_is_refused(cluster: Make) -> None:
    c = cluster()
    c.add(0)
    c.add(1, digest="another")
    with pytest.raises(ProtocolError, match=r"rank 1 \(node-a\) was started with another configuration"):
        c.workers.wait_ready()


def test_two_processes_of_one_rank_are_refused(cluster: Make) -> None:
    c = cluster()
    c.add(1)
    c.add(1)
    with pytest.raises(ProtocolError, match="two processes are rank 1"):
        c.workers.wait_ready()


def test_a_rank_outside_the_world_is_refused(cluster: Make) -> None:
    c = cluster()
    c.add(2)
    with pytest.raises(ProtocolError, match="calls itself rank 2"):
        c.workers.wait_ready()


@pytest.mark.parametrize("stage", ["hello", "reply"])
def test_a_rank_speaks_for_itself_alone(cluster: Make, stage: str) -> None:
    """Whoever has the key of rank 1 cannot be rank 0, neither at the start nor later."""

    def respond(fake: FakeRank, call: Call) -> None:
        fake.send(Reply(call.id, 0, HOST, empty(call.command)))

    c = cluster(2)
    c.add(0, lambda rank, call: None)
    if stage == "hello":
        c.ranks.append(FakeRank(c.router.credentials[1], 0, 2))
        with pytest.raises(ProtocolError, match=r"^rank 1 calls itself rank 0$"):
            c.workers.wait_ready()
    else:
        c.add(1, respond)
        with pytest.raises(ProtocolError, match=r"^rank 1 \(node-a, pid 1001\) calls itself rank 0$"):
            c.workers.call(RefitEngine(0), step=0)


def test_a_rank_that_never_connects_is_named(cluster: Make) -> None:
    c = cluster(3, start_timeout=0.3)
    c.add(0)
    c.add(1, hello=False)
    with pytest.raises(DeadlineError) as caught:
        c.workers.wait_ready()
    lines = str(caught.value).splitlines()
    assert lines[0] == "start: rank 1, 2 did not reply within 0.3 s"
    assert "rank 1: start, import (worker.py:1), last heard" in lines[1]
    assert lines[2] == "  rank 2: start, never connected"


def test_a_signal_that_comes_with_an_event_does_not_lose_it(cluster: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its handler runs in the main thread whichever thread took the signal, also between two frames of a message."""
    c = cluster()
    received = c.router.receive

    def interrupted(timeout: float) -> Any:
        event = received(timeout)
        if event is not None:
            c.workers.interrupt(KeyboardInterrupt())
        return event

    c.add(0)
    monkeypatch.setattr(c.router, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        c.workers.wait_ready()
    with pytest.raises(KeyboardInterrupt):  # between events it is raised at once
        c.workers.interrupt(KeyboardInterrupt())
    assert str(c.workers.explain("stopped by SIGINT")) == "start: stopped by SIGINT; rank 1 had not connected"


# --- calls -----------------------------------------------------------------------------------------------------------


def test_one_command_for_all_and_one_for_each(cluster: Make) -> None:
    def respond(rank: FakeRank, call: Call) -> Result:
        match call.command:
            case RefitEngine(version):
                return RefitResult(version, rank.rank, 0, 0)
            case TrainStep(micro_batches):
                return TrainResult([{"tokens": len(micro_batches[0][0].tokens)}], grad_norm=0.0, lr=0.0)
        return empty(call.command)

    c = cluster(3)
    workers = c.add_all(respond)
    assert workers.call(RefitEngine(7), step=4) == [RefitResult(7, rank, 0, 0) for rank in range(3)]
    assert workers.seconds == [{"work": 0.25}, {"work": 0.5}, {"work": 0.75}]
    batches = [TrainStep([[TrainSequence(np.zeros(n, np.int32), np.ones(n, np.float32))]]) for n in (5, 6, 7)]
    assert [result.sums for result in workers.call(batches, step=4)] == [[{"tokens": n}] for n in (5, 6, 7)]
    assert workers.place == "train, step 4"
    with pytest.raises(ValueError, match="2 commands for 3 ranks"):
        workers.call(batches[:2], step=4)
    workers.stop()
    assert all(isinstance(rank.received[-1], Stop) for rank in c.ranks)


def only(rank: int, act: Callable[[FakeRank, Call], Any]) -> Callable[..., Any]:
    """A response that differs on one rank."""
    return lambda fake, call: act(fake, call) if fake.rank == rank else empty(call.command)


def test_an_exception_on_a_rank_is_named(cluster: Make) -> None:
    failure = Failure("RefitError", "checksum of model.norm differs", "Traceback: ...")
    workers = cluster(2).add_all(only(1, lambda fake, call: failure))
    with pytest.raises(WorkerFailedError) as caught:
        workers.call(RefitEngine(1), step=3)
    assert str(caught.value) == "rank 1 (node-a), refit, step 3: RefitError: checksum of model.norm differs"
    assert caught.value.details == "Traceback: ..."


def test_a_missed_deadline_says_who_is_where(cluster: Make) -> None:
    def hang(fake: FakeRank, call: Call) -> None:
        fake.send(Heartbeat(1, Phase.TRAIN, 3, "all_reduce (distributed.py:10) in train_step (trainer.py:20)"))

    workers = cluster(2, train_timeout=0.3).add_all(only(1, hang))
    began = time.monotonic()
    with pytest.raises(DeadlineError) as caught:
        workers.call(TrainStep([]), step=3)
    assert time.monotonic() - began < 3
    lines = str(caught.value).splitlines()
    assert lines[0] == "train, step 3: rank 1 did not reply within 0.3 s"
    assert "rank 1 (node-a, pid 1001): train, step 3, all_reduce (distributed.py:10) in train_step" in lines[1]
    assert "runs/x/logs/rank-*.stacks" in lines[2]


def test_a_rank_without_heartbeats_is_noticed_before_the_deadline(cluster: Make) -> None:
    def live_on(fake: FakeRank, call: Call) -> None:
        while not fake.gone.wait(0.1):
            fake.send(Heartbeat(fake.rank, Phase.TRAIN, 3))

    respond = lambda fake, call: live_on(fake, call) if fake.rank == 0 else None  # noqa: E731
    workers = cluster(2, heartbeat_timeout=0.6, train_timeout=60).add_all(respond)
    with pytest.raises(WorkerSilentError, match=r"rank 1 \(node-a, pid 1001\) is silent: train, step 3"):
        workers.call(TrainStep([]), step=3)


def die(fake: FakeRank, call: Call) -> None:
    fake.gone.set()


def test_a_dead_rank_is_named_at_once(cluster: Make) -> None:
    workers = cluster(3).add_all(only(2, die))
    began = time.monotonic()
    with pytest.raises(WorkerLostError, match=r"rank 2 \(node-a, pid 1002\) died: train, step 3"):
        workers.call(TrainStep([]), step=3)
    assert time.monotonic() - began < 2


def test_a_death_explains_failures_of_others(cluster: Make) -> None:
    """The others' collectives break first; what they say is not the cause."""

    def respond(fake: FakeRank, call: Call) -> Result | Failure | None:
        if fake.rank == 2:
            time.sleep(0.2)
            return die(fake, call)
        return Failure("RuntimeError", "Connection closed by peer")

    workers = cluster(3).add_all(respond)
    with pytest.raises(WorkerLostError, match="rank 2"):
        workers.call(TrainStep([]), step=3)


def say_goodbye(fake: FakeRank, call: Call) -> None:
    fake.send(Heartbeat(fake.rank, Phase.STOP, 3, "stopped by SIGTERM"))
    fake.gone.set()


def test_an_announced_stop_is_no_death(cluster: Make) -> None:
    workers = cluster(2).add_all(say_goodbye)
    with pytest.raises(WorkerStoppedError, match=r"^train, step 3: stopped by SIGTERM$"):
        workers.call(TrainStep([]), step=3)


def test_a_watchdog_that_is_gone_before_the_last_reply_is_heard_is_no_death(cluster: Make) -> None:
    def respond(fake: FakeRank, call: Call) -> Result:
        if isinstance(call.command, Stop):
            watchdogs.pop().close()
        else:
            watchdogs.append(Dealer(fake._credentials))
            watchdogs[0].send(Heartbeat(fake.rank, Phase.TRAIN, 0))
        time.sleep(0.2)
        return empty(call.command)

    watchdogs: list[Dealer] = []
    workers = cluster(1).add_all(respond)
    workers.call(RefitEngine(0), step=0)
    workers.stop()


def test_a_death_instead_of_the_last_reply_is_one(cluster: Make) -> None:
    def respond(fake: FakeRank, call: Call) -> None:
        fake.gone.set()

    with pytest.raises(WorkerLostError, match=r"rank 0 \(node-a, pid 1000\) died: stop"):
        cluster(1).add_all(respond).stop()


def test_a_death_explains_the_stop_of_others(cluster: Make) -> None:
    """As when a launcher stops the remaining ranks."""
    workers = cluster(3).add_all(lambda s, c: die(s, c) if s.rank == 1 else say_goodbye(s, c))
    with pytest.raises(WorkerLostError, match="rank 1"):
        workers.call(TrainStep([]), step=3)


def test_a_death_while_the_controller_was_busy(cluster: Make) -> None:
    c = cluster(2)
    workers = c.add_all()
    c.ranks[1].leave()
    assert "rank 1 (node-a, pid 1001) died" in str(workers.explain("stopped by SIGTERM"))
    with pytest.raises(WorkerLostError, match="rank 1"):
        workers.call(RefitEngine(1), step=1)


def test_a_deadline_holds_while_others_talk(cluster: Make) -> None:
    """Heartbeats that come faster than the clock is looked at must not hide that the time is over."""

    def chatter(fake: FakeRank, call: Call) -> None:
        while not fake.gone.wait(0.002):
            fake.send(Heartbeat(0, Phase.TRAIN, 1))

    workers = cluster(2, train_timeout=0.3).add_all(only(0, chatter))
    with pytest.raises(DeadlineError, match="rank 0 did not reply"):
        workers.call(TrainStep([]), step=1)


def test_malformed_bytes_name_their_sender(cluster: Make) -> None:
    workers = cluster(2).add_all(only(1, lambda fake, call: fake.dealer._socket.send(b"nonsense")))
    with pytest.raises(ProtocolError, match=r"rank 1 \(node-a, pid 1001\): not a message of this protocol"):
        workers.call(RefitEngine(1), step=1)


@pytest.mark.parametrize(
    ("result", "what"),
    [
        (Ok(), "replied to RefitEngine with Ok instead of RefitResult"),
        (TrainResult([{}], 1.0, 1e-6), "replied to RefitEngine with TrainResult instead of RefitResult"),
    ],
)
def test_a_result_of_another_type_is_an_error(cluster: Make, result: Result, what: str) -> None:
    workers = cluster(2).add_all(only(1, lambda fake, call: result))
    with pytest.raises(ProtocolError, match=rf"rank 1 \(node-a, pid 1001\) {what}"):
        workers.call(RefitEngine(1), step=1)


def test_a_stale_reply_is_an_error(cluster: Make) -> None:
    def respond(fake: FakeRank, call: Call) -> None:
        fake.send(Reply(call.id - 1, fake.rank, HOST, RefitResult(1, 0, 0, 0)))

    workers = cluster(2).add_all(only(1, respond))
    with pytest.raises(ProtocolError, match=r"rank 1 \(node-a, pid 1001\) sent a stale reply to command 0"):
        workers.call(RefitEngine(1), step=1)


def test_waiting_costs_no_cpu(cluster: Make) -> None:
    c = cluster(1, train_timeout=1.0)
    c.add(0, lambda fake, call: fake.gone.wait(5) and None)  # type: ignore[func-returns-value]
    c.workers.wait_ready()
    began = time.thread_time()
    with pytest.raises(DeadlineError):
        c.workers.call(TrainStep([]), step=1)
    assert time.thread_time() - began < 0.1


# --- rollouts --------------------------------------------------------------------------------------------------------


def request(number: int) -> Request:
    return Request(str(number), [1, 2, number], SamplingParams(max_new_tokens=4))


def output(rid: str, reason: FinishReason = FinishReason.STOP) -> Output:
    return Output(rid, [7], [-0.5], reason, [(0, 1)])


class FakeEngine:
    """Completes requests at once, except those in ``slow``, which have to be aborted."""

    def __init__(self, slow: tuple[str, ...] = ()) -> None:
        self.slow = slow

    def __call__(self, fake: FakeRank, call: Call) -> Result | Failure | None:
        match call.command:
            case Submit(requests):
                finished = [output(r.rid) for r in requests if r.rid not in self.slow]
                if finished:
                    fake.send(Completions(fake.rank, finished))
            case AbortRequests(rids):
                fake.send(Completions(fake.rank, [output(rid, FinishReason.ABORT) for rid in rids]))
            case Generate():
                return None if fake.leader else Ok()  # a rank that steps does not reply before the end
            case EndGenerate():
                return Ok()
        return None


def submitted(fake: FakeRank) -> list[str]:
    return [r.rid for command in fake.received if isinstance(command, Submit) for r in command.requests]


def test_requests_go_round_the_engines_in_order_of_submission(cluster: Make) -> None:
    c = cluster(4)
    workers = c.add_all(FakeEngine(), engine_size=2)
    for _ in range(2):  # each session begins with the first engine again
        with workers.rollout(step=0) as session:
            session.submit([request(i) for i in range(3)])
            session.submit([request(3), request(4)])
            outputs = list(iter(session.next, None))
        assert sorted(o.rid for o in outputs) == ["0", "1", "2", "3", "4"]
    assert submitted(c.ranks[0]) == ["0", "2", "4"] * 2
    assert submitted(c.ranks[2]) == ["1", "3"] * 2
    assert all(c.ranks[rank].received == [Generate()] * 2 for rank in (1, 3))
    assert workers.seconds[3] == {"work": 1.0}


def test_one_engine_gets_all_requests_of_a_prompt(cluster: Make) -> None:
    c = cluster(2)
    workers = c.add_all(FakeEngine())
    with workers.rollout(step=0) as session:
        prompts = [msgspec.structs.replace(request(i), input_ids=[i // 2]) for i in range(6)]
        session.submit(prompts)
        list(iter(session.next, None))
    assert submitted(c.ranks[0]) == ["0", "1", "4", "5"]
    assert submitted(c.ranks[1]) == ["2", "3"]


def test_later_turns_are_submitted_while_others_run(cluster: Make) -> None:
    workers = cluster(2).add_all(FakeEngine())
    seen = []
    with workers.rollout(step=0) as session:
        session.submit([request(0), request(1)])
        for finished in iter(session.next, None):
            seen.append(finished.rid)
            if int(finished.rid) < 6:
                session.submit([request(int(finished.rid) + 2)])
    assert sorted(seen) == [str(i) for i in range(8)]


def test_aborted_requests_come_back(cluster: Make) -> None:
    workers = cluster(2).add_all(FakeEngine(slow=("1", "2")))
    with workers.rollout(step=0) as session:
        session.submit([request(i) for i in range(4)])
        outputs = iter(session.next, None)
        assert {next(outputs).rid, next(outputs).rid} == {"0", "3"}
        session.abort(["2", "never submitted"])
        assert next(outputs) == output("2", FinishReason.ABORT)
        session.abort()
        assert [o.rid for o in outputs] == ["1"]


def test_leaving_a_rollout_early_aborts_the_rest(cluster: Make) -> None:
    c = cluster(1)
    workers = c.add_all(FakeEngine(slow=("0",)))
    with workers.rollout(step=0) as session:
        session.submit([request(0)])
    assert c.ranks[0].received[-2:] == [AbortRequests(["0"]), EndGenerate()]
    with workers.rollout(step=1) as session:  # what was left over does not come up again
        session.submit([request(1)])
        assert [o.rid for o in iter(session.next, None)] == ["1"]


def test_a_running_request_cannot_be_submitted_again(cluster: Make) -> None:
    workers = cluster(1).add_all(FakeEngine(slow=("0",)))
    with workers.rollout(step=0) as session:
        session.submit([request(0)])
        with pytest.raises(ValueError, match="'0' is already running"):
            session.submit([request(0)])


def test_a_failure_ends_a_rollout(cluster: Make) -> None:
    failure = Failure("ValueError", "request 1: 3 + 4 tokens exceed the context of 6")
    engine = FakeEngine()
    workers = cluster(2).add_all(
        lambda s, c: failure if s.rank == 1 and isinstance(c.command, Submit) else engine(s, c)
    )

    def rollout() -> None:
        with workers.rollout(step=5) as session:
            session.submit([request(0), request(1)])
            list(iter(session.next, None))

    with pytest.raises(WorkerFailedError, match=r"rank 1 \(node-a\), rollout, step 5: ValueError: request 1"):
        rollout()
