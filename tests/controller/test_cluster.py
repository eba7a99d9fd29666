"""What the controller makes of its ranks: results in order, and one clear error for everything that goes wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from miles_spmd.controller.cluster.errors import (
    DeadlineError,
    ProtocolError,
    WorkerFailedError,
    WorkerLostError,
    WorkerSilentError,
    WorkerStoppedError,
)
from miles_spmd.protocol.commands import RefitEngine, Stop, TrainStep
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.messages import Call, Failure, Heartbeat, Reply
from miles_spmd.protocol.results import Ok, RefitResult, Result, TrainResult
from miles_spmd.types.phase import Phase
from miles_spmd.types.train_sequence import TrainSequence
from tests.controller.harness import Make
from tests.controller.ranks import HOST, FakeRank, empty

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


def test_a_reply_that_nobody_waits_for_is_harmless(cluster: Make) -> None:
    def respond(fake: FakeRank, call: Call) -> Result:
        for _ in range(2):  # the second one of these comes late itself
            fake.send(Reply(call.id - 1, fake.rank, HOST, RefitResult(9, 0, 0, 0)))
            fake.send(Reply(call.id, fake.rank, HOST, RefitResult(1, 0, 0, 0)))
        return RefitResult(2, 0, 0, 0)

    workers = cluster(2).add_all(only(1, respond))
    for _ in range(3):
        assert [result.version for result in workers.call(RefitEngine(1), step=1)] == [0, 1]


def test_a_reply_to_what_was_not_sent_is_an_error(cluster: Make) -> None:
    def respond(fake: FakeRank, call: Call) -> None:
        fake.send(Reply(call.id + 1, fake.rank, HOST, RefitResult(1, 0, 0, 0)))

    workers = cluster(2).add_all(only(1, respond))
    with pytest.raises(
        ProtocolError, match=r"rank 1 \(node-a, pid 1001\) replied to command 2, which was not sent yet"
    ):
        workers.call(RefitEngine(1), step=1)


def test_commands_are_under_way_together(cluster: Make) -> None:
    """Each has results, seconds and a deadline of its own, whatever the order in which they are waited for."""

    def respond(fake: FakeRank, call: Call) -> Result:
        time.sleep(0.05 * fake.rank)
        return RefitResult(call.id, 0, 0, 0) if isinstance(call.command, RefitEngine) else empty(call.command)

    workers = cluster(2).add_all(respond)
    calls = [workers.begin(RefitEngine(0), step=step) for step in range(3)]
    step = workers.begin(TrainStep([]), step=3)
    for call in reversed(calls):
        assert [result.version for result in workers.wait(call)] == [call.id] * 2
        assert workers.seconds == [{"work": 0.25}, {"work": 0.5}]
    assert len(workers.wait(step)) == 2


def test_the_deadline_of_each_command_holds(cluster: Make) -> None:
    silent = lambda fake, call: None if isinstance(call.command, TrainStep) else empty(call.command)  # noqa: E731
    workers = cluster(1, train_timeout=0.3, refit_timeout=60).add_all(silent)
    workers.begin(TrainStep([]), step=1)
    refit = workers.begin(RefitEngine(0), step=2)
    workers.wait(refit)
    with pytest.raises(DeadlineError, match=r"^train, step 1: rank 0 did not reply within 0.3 s"):
        workers.wait(workers.begin(TrainStep([]), step=2))


def test_waiting_costs_no_cpu(cluster: Make) -> None:
    c = cluster(1, train_timeout=1.0)
    c.add(0, lambda fake, call: fake.gone.wait(5) and None)  # type: ignore[func-returns-value]
    c.workers.wait_ready()
    began = time.thread_time()
    with pytest.raises(DeadlineError):
        c.workers.call(TrainStep([]), step=1)
    assert time.thread_time() - began < 0.1
